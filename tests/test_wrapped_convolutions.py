"""What wraps or watches the convolutions of the modulation takes effect, although the operator needs only weights."""

import accelerate
import pytest
import torch
import transformers
from small_models import (
    SMALL,
    assert_equal,
    assert_same_gradients,
    build,
    images,
    one_thread,  # noqa: F401
)

import focalnet

NAME = "FocalNetForImageClassification"


@pytest.mark.parametrize("to", ["cpu", "disk", "device map"])
def test_a_model_that_accelerate_offloads_gives_the_same_logits(to, tmp_path):
    model = build(focalnet, NAME, SMALL)
    with torch.no_grad():
        expected = model(images()).logits
    if to == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif to == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        model.save_pretrained(tmp_path)
        device_map = {"focalnet.embeddings": "cpu", "focalnet.encoder": "disk", "focalnet.layernorm": "cpu"}
        model = focalnet.FocalNetForImageClassification.from_pretrained(
            tmp_path, device_map={**device_map, "classifier": "cpu"}, offload_folder=str(tmp_path / "offloaded")
        )
    with torch.no_grad():
        assert_equal(model.eval()(images()).logits, expected)


class Adapter(torch.nn.Module):
    """As adapters do: it has the weights of what it wraps, and does more than these say."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        return self.conv(x) + x.mean()


def replace(modulation):
    modulation.projection_context = Adapter(modulation.projection_context)


def replace_a_level(modulation):
    modulation.focal_layers[0][0] = Adapter(modulation.focal_layers[0][0])


def replace_an_activation(modulation):
    modulation.focal_layers[0][1] = torch.nn.ReLU()


def hook(modulation):
    modulation.focal_layers[0][0].register_forward_hook(lambda _, __, output: 2 * output)


def rebind(modulation):
    forward = modulation.projection_context.forward
    modulation.projection_context.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("normalize_modulator", [False, True], ids=["", "normalised"])
@pytest.mark.parametrize("change", [replace, replace_a_level, replace_an_activation, hook, rebind])
def test_a_changed_convolution_counts_as_in_transformers(change, normalize_modulator):
    fields = SMALL | {"normalize_modulator": normalize_modulator}
    ours, theirs = (build(library, NAME, fields) for library in (focalnet, transformers))
    for model in (ours, theirs):
        for module in list(model.modules()):
            if hasattr(module, "focal_layers"):
                change(module)
        model.loss = model(images(29, 50), labels=torch.tensor([0, 4])).loss
        model.loss.backward()
    assert_equal(ours.loss, theirs.loss)
    assert_same_gradients(ours, theirs)


def test_a_backend_that_was_asked_for_says_which_module_keeps_it_from_running():
    modulation = focalnet.FocalModulation(8, backend="cpu")
    hook(modulation)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this FocalModulation: focal_layers\.0\.0 was"):
        modulation(torch.randn(1, 4, 4, 8))

"""What replaces, wraps, watches or quantises a part of the modulation takes effect, although the operator needs only
weights: in our models and in patched ones.
"""

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import (
    SMALL,
    assert_equal,
    assert_same_gradients,
    build,
    images,
    one_thread,  # noqa: F401
    theirs,
)
from torch.nn.utils import parametrize, prune

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


def replace_the_activation_of_the_global_context(modulation):
    modulation.activation = torch.nn.Tanh()


def hook_the_activation_of_the_global_context(modulation):
    modulation.activation.register_forward_hook(lambda _, __, output: 2 * output)


def approximate_an_activation(modulation):
    modulation.focal_layers[0][1].approximate = "tanh"


def dilate(modulation):
    conv = modulation.focal_layers[0][0]
    conv.dilation, conv.padding = (2, 2), tuple(2 * size for size in conv.padding)


def pad_with_copies(modulation):
    conv = modulation.focal_layers[0][0]
    conv.padding_mode = "replicate"


def add_a_bias(modulation):
    conv = modulation.focal_layers[0][0]
    conv.bias = torch.nn.Parameter(torch.linspace(-1, 1, conv.out_channels))


def lengthen_a_level(modulation):
    modulation.focal_layers[0].append(torch.nn.Hardtanh(-0.5, 0.5))


def group_the_context(modulation):
    context = modulation.projection_context
    context.groups = 2
    context.weight = torch.nn.Parameter(context.weight.detach()[:, : context.in_channels // 2])


def parametrise(modulation):
    parametrize.register_parametrization(modulation.projection_context, "weight", torch.nn.Tanh())


def prune_half(modulation):
    prune.l1_unstructured(modulation.focal_layers[0][0], "weight", 0.5)


class Doubled(torch.Tensor):
    """As quantised tensors are: a convolution knows what it stands for, and its elements are something else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.conv2d:
            image, weight, *rest = args
            with torch._C.DisableTorchFunctionSubclass():
                return F.conv2d(image, 2 * weight.as_subclass(torch.Tensor), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


def quantise(modulation):
    conv = modulation.projection_context
    conv.weight = torch.nn.Parameter(conv.weight.detach().as_subclass(Doubled))


CHANGES = [
    replace,
    replace_a_level,
    replace_an_activation,
    hook,
    rebind,
    replace_the_activation_of_the_global_context,
    hook_the_activation_of_the_global_context,
    approximate_an_activation,
    dilate,
    pad_with_copies,
    add_a_bias,
    lengthen_a_level,
    group_the_context,
    parametrise,
    prune_half,
]


def changed(change, model):
    for module in list(model.modules()):
        if hasattr(module, "focal_layers"):
            change(module)
    return model


def patched(model):
    assert not focalnet.patch(model).left
    return model


MAKE = {"ours": lambda: build(focalnet, NAME, SMALL), "patched": lambda: patched(theirs())}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("change", [*CHANGES, quantise])
def test_what_is_changed_counts_in_inference_as_in_transformers(change, make):
    model, original = make(), theirs()
    with torch.no_grad():
        before = model(images(29, 50)).logits
        expected = changed(change, original)(images(29, 50)).logits
        assert_equal(changed(change, model)(images(29, 50)).logits, expected)
    assert (before - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("normalize_modulator", [False, True], ids=["", "normalised"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_counts_in_training_as_in_transformers(change, normalize_modulator):
    fields = SMALL | {"normalize_modulator": normalize_modulator}
    models = [build(focalnet, NAME, fields), patched(theirs(fields)), theirs(fields)]
    for model in models:
        model.loss = changed(change, model)(images(29, 50), labels=torch.tensor([0, 4])).loss
        model.loss.backward()
    for model in models[:2]:
        assert_equal(model.loss, models[2].loss)
        assert_same_gradients(model, models[2])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("how", ["replaced", "hooked", "rebound", "removed"])
def test_a_changed_pooler_counts_as_in_transformers(how, training):
    outputs = []
    for library in (focalnet, transformers):
        model = build(library, "FocalNetModel", SMALL).train(training)
        if how == "replaced":
            model.pooler = torch.nn.AdaptiveMaxPool1d(1)
        elif how == "hooked":
            model.pooler.register_forward_hook(lambda _, args, output: output + args[0].amax(2, keepdim=True))
        elif how == "rebound":
            model.pooler.forward = lambda x: x[:, :, :1]
        else:
            model.pooler = None
        torch.manual_seed(0)  # stochastic depth
        outputs.append(model(images(29, 50)).pooler_output)
    if how == "removed":
        assert outputs == [None, None]
    else:
        assert_equal(*outputs)


def test_a_backend_that_was_asked_for_says_which_module_keeps_it_from_running():
    modulation = focalnet.FocalModulation(8, backend="cpu")
    hook(modulation)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this FocalModulation: focal_layers\.0\.0 was"):
        modulation(torch.randn(1, 4, 4, 8))

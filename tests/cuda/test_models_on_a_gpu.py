"""Whole models on a GPU with the backends that are chosen there: no worse than the reference in the same dtype."""

import contextlib

import pytest
import torch
from transformers import FocalNetConfig as TheirConfig
from transformers import FocalNetForImageClassification as TheirModel

import focalnet
from focalnet.backends import cuda

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.missing() is not None, reason=f"the backend cuda cannot run here: {cuda.missing()}"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Maps of 16, 8, 4 and 2 rows.
FIELDS = {"image_size": 64, "num_labels": 16, "drop_path_rate": 0.0}


def own_model():
    return focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig.from_variant("tiny_lrf", **FIELDS))


def patched_model():
    config = focalnet.FocalNetConfig.from_variant("tiny_lrf", **FIELDS)
    model = TheirModel(TheirConfig(**config.to_dict()))
    focalnet.patch(model)
    return model


def logits_and_gradients(make, state, images, dtype, device, backend):
    """(logits, every gradient in one vector), in float64 on the CPU."""
    model = make().to(device, dtype)
    model.load_state_dict(state)
    chosen = focalnet.use_backend(backend) if backend else contextlib.nullcontext()
    # cuDNN would round the convolutions of float32 to TF32, and choose engines for seconds.
    with chosen, torch.backends.cudnn.flags(enabled=False):
        images = images.to(device, dtype)
        with torch.inference_mode():
            logits = model.eval()(images).logits
        model.train()(images).logits.float().square().sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return logits.double().cpu(), gradients.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [own_model, patched_model], ids=lambda make: make.__name__)
def test_logits_and_gradients_are_at_most_twice_as_far_from_float64_as_the_references(make, dtype):
    state = {name: value.to(dtype).double() for name, value in make().state_dict().items()}
    images = torch.randn(3, 3, 64, 64).to(dtype).double()
    exact = logits_and_gradients(make, state, images, torch.float64, "cpu", "reference")
    rounded = logits_and_gradients(make, state, images, dtype, DEVICE, "reference")
    mine = logits_and_gradients(make, state, images, dtype, DEVICE, None)
    for name, m, r, e in zip(("logits", "gradients"), mine, rounded, exact, strict=True):
        assert (m - e).norm() <= 2 * (r - e).norm() + torch.finfo(dtype).eps * e.norm(), name

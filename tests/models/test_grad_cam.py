"""grad-cam (pytorch_grad_cam) explains our models as it explains those of transformers."""

import sys

import pytest
import torch
import transformers
from small_models import build, one_thread  # noqa: F401
from small_sources import FIELDS, Logits

import focalnet
from focalnet.benchmark.torchvision_stub import stubbed_torchvision

# It imports torchvision for what is not used here. The stub is empty and goes with the context.
with stubbed_torchvision():
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: make install")

METHODS = [pytorch_grad_cam.GradCAM, pytorch_grad_cam.LayerCAM, pytorch_grad_cam.EigenCAM]


def cam_of(library, method, images, targets=None):
    model = build(library, "FocalNetForImageClassification", FIELDS)
    layer = model.focalnet.encoder.stages[-1].layers[-1]

    def as_map(activations):
        """Tokens (B, N, C) of transformers, or maps (B, H, W, C) of ours, to (B, C, H, W)."""
        grid = activations.unflatten(1, (4, 6)) if activations.ndim == 3 else activations
        return grid.permute(0, 3, 1, 2)

    with method(model=Logits(model).eval(), target_layers=[layer], reshape_transform=as_map) as cam:
        return torch.tensor(cam(input_tensor=images.clone(), targets=targets))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_pictures_are_those_of_transformers_model(method):
    images = torch.randn(2, 3, 32, 48)
    ours, theirs = cam_of(focalnet, method, images), cam_of(transformers, method, images)
    assert ours.shape == (2, 32, 48)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert "torchvision" not in sys.modules

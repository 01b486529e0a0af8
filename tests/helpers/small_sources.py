"""A small model of every source, original and patched, for tests of whole models."""

from __future__ import annotations

import pytest
import torch
import transformers
from small_models import build
from sources import AuthorsFocalNet, TimmFocalNet

import focalnet

FIELDS = {
    "embed_dim": 8,
    "depths": [1, 1],
    "focal_levels": [2, 1],
    "focal_windows": [3, 5],
    "num_labels": 5,
    "drop_path_rate": 0.0,
}
SIZES = {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 1], "focal_windows": [3, 5], "num_classes": 5}


class Logits(torch.nn.Module):
    """Wraps a model to return logits, whatever its own output type."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        outputs = self.model(images)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


MAKE = {
    "focalnet": lambda: build(focalnet, "FocalNetForImageClassification", FIELDS),
    "transformers": lambda: build(transformers, "FocalNetForImageClassification", FIELDS),
    "authors": lambda: seeded(lambda: AuthorsFocalNet(**SIZES)),
    "timm": lambda: seeded(lambda: TimmFocalNet(**SIZES)),
}


def original(source):
    """The model, not patched."""
    return Logits(MAKE[source]()).eval()


def fast(source):
    """The same model on focalnet's operators."""
    model = original(source)
    if source != "focalnet":
        assert not focalnet.patch(model).left
    return model


SOURCE = pytest.mark.parametrize("source", MAKE)
PATCHED = pytest.mark.parametrize("source", list(MAKE)[1:])

"""The Trainer's collators for each task. They run in the data loader's workers."""

from __future__ import annotations

import torch
from torch import Tensor

from .augmentation import Augment, Mix
from .masks import random_masks
from .settings import Settings

Examples = list[dict[str, object]]


class ClassificationBatch:
    """Collates images with labels: ``pixel_values`` (B, 3, H, W) and ``labels`` (B,).

    Batches for training also have ``other_labels`` (B,), those of the images mixed in, and ``share`` (B,), the weight
    of ``labels``.
    """

    def __init__(self, settings: Settings) -> None:
        self.augment, self.mix = Augment(settings), Mix(settings)

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        labels = torch.tensor([example["label"] for example in examples])
        if "pixel_values" in examples[0]:
            return {"pixel_values": _stacked(examples, "pixel_values"), "labels": labels}
        seeds = [example["seed"] for example in examples]
        images = self.augment(_stacked(examples, "pixels"), seeds)
        images, share = self.mix(images, seeds[0])
        return {
            "pixel_values": images,
            "labels": labels,
            "other_labels": labels.flip(0),
            "share": torch.full((len(labels),), share),
        }


class MaskedBatch:
    """Collates images with SimMIM's random masks: ``pixel_values`` (B, 3, H, W), ``bool_masked_pos`` (B, h * w).

    The masks are the same in every evaluation.
    """

    def __init__(self, settings: Settings, stride: int) -> None:
        self.settings, self.stride = settings, stride
        self.augment = Augment(settings)

    def __call__(self, examples: Examples) -> dict[str, Tensor]:
        if "pixel_values" in examples[0]:
            images, seeds = _stacked(examples, "pixel_values"), [example["index"] for example in examples]
        else:
            seeds = [example["seed"] for example in examples]
            images = self.augment(_stacked(examples, "pixels"), seeds)
        masks = random_masks(seeds, images.shape[-2:], self.stride, self.settings)
        return {"pixel_values": images, "bool_masked_pos": masks}


def _stacked(examples: Examples, name: str) -> Tensor:
    return torch.stack([example[name] for example in examples])

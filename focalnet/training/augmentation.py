"""Makes a batch from views: kornia's augmentations on groups of images, normalisation, and mixing within the batch."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from kornia.augmentation import RandomAffine, RandomErasing
from kornia.augmentation.auto import RandAugment
from torch import Tensor

from .settings import Settings

# RandAugment draws its operations once per call. At 224 x 224 on one core of a Zen 3, calls with 1, 8 and 32 images
# take 7.2, 3.3 and 2.8 ms per image.
GROUP = 8

# The ranges of timm's "rand-m9-mstd0.5-inc1", which the authors trained with, in kornia's units. timm's shear is a
# tangent of up to 0.3, kornia's is a share of 180 degrees. timm's shift is up to 0.45 of a side.
_SHEAR, _SHIFT = 16.7 / 180, 0.45
_POLICY = [
    [("auto_contrast", 0.0, 1.0)],
    [("equalize", 0.0, 1.0)],
    [("invert", 0.0, 1.0)],
    [("rotate", -30.0, 30.0)],
    [("posterize", 4.0, 8.0)],
    [("solarize", 0.0, 1.0)],
    [("solarize_add", 0.0, 0.43)],
    [("color", 0.1, 1.9)],
    [("contrast", 0.1, 1.9)],
    [("brightness", 0.1, 1.9)],
    [("sharpness", 0.1, 1.9)],
    [("shear_x", -_SHEAR, _SHEAR)],
    [("shear_y", -_SHEAR, _SHEAR)],
    [("translate_x", -_SHIFT, _SHIFT)],
    [("translate_y", -_SHIFT, _SHIFT)],
]
_KORNIAS_MAGNITUDES = 30


class Augment:
    """Augments and normalises uint8 images (B, 3, H, W) to float32. Equal seeds give equal images.

    There is a seed for each image. Images are augmented in groups of `GROUP`, each with the seed of its first image.
    """

    def __init__(self, settings: Settings) -> None:
        self.mean = torch.tensor(settings.image_mean).view(3, 1, 1)
        self.std = torch.tensor(settings.image_std).view(3, 1, 1)
        self.before, self.after = _steps_before(settings), _steps_after(settings)

    def __call__(self, pixels: Tensor, seeds: list[int]) -> Tensor:
        images = pixels.float() / 255
        if not self.before and not self.after:
            return (images - self.mean) / self.std
        groups = [self._group(images[i : i + GROUP], seeds[i]) for i in range(0, len(images), GROUP)]
        return torch.cat(groups)

    def _group(self, images: Tensor, seed: int) -> Tensor:
        # kornia draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in self.before:
                images = step(images)
            images = (images.clamp(0, 1) - self.mean) / self.std
            for step in self.after:
                images = step(images)
        return images


def _steps_before(settings: Settings) -> list[Callable[[Tensor], Tensor]]:
    steps: list[Callable[[Tensor], Tensor]] = []
    if settings.randaugment:
        magnitude = settings.magnitude * _KORNIAS_MAGNITUDES / 10
        steps.append(RandAugment(n=settings.randaugment, m=magnitude, policy=_POLICY))
    if settings.rotate or settings.shift or settings.shear or settings.zoom != (1, 1):
        shift = (settings.shift, settings.shift) if settings.shift else None
        zoom = settings.zoom if settings.zoom != (1, 1) else None
        steps.append(RandomAffine(settings.rotate, translate=shift, scale=zoom, shear=settings.shear or None, p=1.0))
    return steps


def _steps_after(settings: Settings) -> list[Callable[[Tensor], Tensor]]:
    # After normalisation 0 is the mean colour.
    return [RandomErasing(p=settings.erase, scale=(0.02, 1 / 3), value=0.0)] if settings.erase else []


class Mix:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of a batch with itself in reverse order.

    kornia's mixup is not used, because it draws the share uniformly, while the published recipes use a Beta
    distribution. It also cannot choose between the two methods.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, images: Tensor, seed: int) -> tuple[Tensor, float]:
        """The mixed images, and the share that each keeps of itself. The rest comes from ``images.flip(0)``."""
        s, rng = self.settings, random.Random(seed)
        if not (s.mixup or s.cutmix) or rng.random() >= s.mix_probability:
            return images, 1.0
        use_cutmix = s.cutmix > 0 and (s.mixup == 0 or rng.random() < s.cutmix_share)
        alpha = s.cutmix if use_cutmix else s.mixup
        share = rng.betavariate(alpha, alpha)
        if not use_cutmix:
            return share * images + (1 - share) * images.flip(0), share
        top, left, height, width = _rectangle(*images.shape[-2:], 1 - share, rng)
        mixed = images.clone()
        place = (..., slice(top, top + height), slice(left, left + width))
        mixed[place] = images.flip(0)[place]
        return mixed, 1 - height * width / (images.shape[-2] * images.shape[-1])


def _rectangle(height: int, width: int, share: float, rng: random.Random) -> tuple[int, int, int, int]:
    """A random rectangle (top, left, height, width) with the image's proportions and ``share`` of its area.

    Its centre may lie anywhere in the image. It is clipped at the image's edges.
    """
    h, w = height * share**0.5 / 2, width * share**0.5 / 2
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    top, bottom = round(max(0, y - h)), round(min(height, y + h))
    left, right = round(max(0, x - w)), round(min(width, x + w))
    return top, left, bottom - top, right - left

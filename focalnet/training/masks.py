"""The masks of SimMIM (Xie et al., arXiv:2111.09886): a fixed share of an image's squares, chosen at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .settings import Settings


def random_masks(seeds: list[int], image_size: tuple[int, int], stride: int, settings: Settings) -> Tensor:
    """Masks (B, h * w), true where a patch of the stem's grid is masked. The grid has a patch every ``stride`` pixels.

    Raises:
        ValueError: mask_patch_size is not a multiple of ``stride``.
    """
    if settings.mask_patch_size % stride:
        raise ValueError(
            f"mask_patch_size: expected a multiple of the stem's stride {stride}, got {settings.mask_patch_size}"
        )
    each = settings.mask_patch_size // stride
    height, width = (math.ceil(side / stride) for side in image_size)
    rows, columns = math.ceil(height / each), math.ceil(width / each)
    hidden = round(settings.mask_ratio * rows * columns)
    masks = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(rows * columns, dtype=torch.bool)
        mask[torch.randperm(rows * columns, generator=generator)[:hidden]] = True
        squares = mask.view(rows, columns).repeat_interleave(each, 0).repeat_interleave(each, 1)
        masks.append(squares[:height, :width].flatten())
    return torch.stack(masks)

"""Patching of patch embeddings that pad their images, so that exported graphs pad correctly at every size.

Their own forward branches on whether the image size is a multiple of the patch size, and an exported graph records
only the branch of the example's size. The patched forward pads first, without a branch on the size, and then calls
the module's own forward. The results are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..fusion.part_names import BLOCK
from ..models.padding import pad_to_multiple
from .probe import TOLERANCE, differ_by, twin_of

NAMES = {source: BLOCK[source].patch_projection for source in ("transformers", "authors")}  # timm's do not pad


def source_of(module: nn.Module) -> str | None:
    """The code base whose name for the convolution occurs in ``module``, or None."""
    return next((source for source, name in NAMES.items() if name in module._modules), None)


def pads(module: nn.Module) -> bool:
    """Whether ``module`` is a strided convolution of images that it pads to a multiple of its ``patch_size``."""
    source = source_of(module)
    conv = None if source is None else module._modules[NAMES[source]]
    size: Any = module.__dict__.get("patch_size")
    if not isinstance(conv, nn.Conv2d) or conv.stride == (1, 1) or not _is_pair(size):
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin = twin_of(module, generator)
        x = torch.randn(2, conv.in_channels, 2 * size[0] + 1, 3 * size[1] + 1, generator=generator)
        try:
            return _agree(forward(twin, x), type(twin).forward(twin, x))
        except Exception:  # the module does not take an image
            return False


def forward(module: nn.Module, pixel_values: Tensor) -> object:
    """The ``forward`` of patched embeddings: pads images (B, C, H, W) and returns the result of the module's own."""
    patch_size: Any = module.patch_size
    padded = pad_to_multiple(pixel_values.permute(0, 2, 3, 1), patch_size).permute(0, 3, 1, 2)
    return type(module).forward(module, padded)


def _is_pair(size: object) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 1 for n in size)


def _agree(actual: Any, expected: Any) -> bool:
    """Whether two outputs agree: a map, or a tuple of tokens and the size of their grid.

    Not bit by bit: the padded images may lie in another memory format, for which oneDNN may choose another kernel.
    """
    if isinstance(expected, tuple):
        return all(_agree(a, e) for a, e in zip(actual, expected, strict=True))
    if not isinstance(expected, Tensor):
        return actual == expected
    return actual.shape == expected.shape and differ_by(actual, expected) <= TOLERANCE

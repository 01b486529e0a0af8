"""Problem: one call of an operator, as far as a backend may look at it before it takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What a backend may look at before it takes a call."""

    operator: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    channels: int
    kernel_sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, operator: str, ctx: Tensor, focal_weights: Sequence[Tensor]) -> Problem:
        kernel_sizes = tuple((weight.shape[-2], weight.shape[-1]) for weight in focal_weights)
        return cls(operator, ctx.device, ctx.dtype, *ctx.shape, kernel_sizes)

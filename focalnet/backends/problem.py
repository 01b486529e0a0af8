"""What a backend may look at before it takes a call: the `Problem`, and whether a tensor is one it can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter


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


def is_plain_tensor(tensor: object) -> bool:
    """Whether an operator may read the elements of ``tensor`` by their strides.

    It may not where a subclass stands for something else (quantised, sharded, low rank), or the layout is sparse.
    """
    return type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided


_PLAIN_TENSORS = (Parameter, Tensor)

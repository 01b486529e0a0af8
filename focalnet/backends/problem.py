"""What a backend may look at before it takes a call: the `Problem`, and whether a tensor is one it can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Problem(NamedTuple):
    """What a backend may look at before it takes a call.

    ``has_affine_norm`` is about operators with a LayerNorm in them: whether it has weight, bias and an eps above 0.
    """

    operator: str
    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    height: int = 1
    width: int = 1
    channels: int = 1
    kernel_sizes: tuple[tuple[int, int], ...] = ()
    has_affine_norm: bool = True

    @classmethod
    def of(cls, operator: str, ctx: Tensor, focal_weights: Sequence[Tensor] = ()) -> Problem:
        """Of a map ``ctx`` (B, H, W, C)."""
        kernel_sizes = tuple((weight.shape[-2], weight.shape[-1]) for weight in focal_weights)
        return cls(operator, ctx.device, ctx.dtype, *ctx.shape, kernel_sizes)

    @classmethod
    def of_rows(cls, operator: str, rows: Tensor, *norm: Tensor | float | None) -> Problem:
        """Of ``rows`` (B, ..., C), of which only C lies side by side; ``norm`` are weight, bias and eps, if any."""
        batch, *positions, channels = rows.shape if rows.ndim > 1 else (1, *rows.shape)
        height = torch.Size(positions).numel()
        has_affine_norm = not norm or (None not in norm[:2] and bool(norm[2]))
        return cls(operator, rows.device, rows.dtype, batch, height, 1, channels, (), has_affine_norm)


def is_plain_tensor(tensor: object) -> bool:
    """Whether an operator may read the elements of ``tensor`` by their strides.

    It may not where a subclass stands for something else (quantised, sharded, low rank), or the layout is sparse.
    """
    return type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided


_PLAIN_TENSORS = (Parameter, Tensor)

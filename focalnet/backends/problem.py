"""What a backend may look at before it takes a call: the `Problem`, and whether a tensor is one it can read."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

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
    kernel_sizes: tuple[tuple[int, ...], ...] = ()  # (height, width) of each level
    has_affine_norm: bool = True


def is_plain_tensor(tensor: Any) -> TypeGuard[Tensor]:
    """Whether an operator may read the elements of ``tensor`` by their strides.

    It may not where a subclass stands for something else (quantised, sharded, low rank), or the layout is sparse.
    """
    return type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided


_PLAIN_TENSORS = (Parameter, Tensor)

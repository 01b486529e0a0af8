"""`Problem`, the facts from which a backend decides whether it can run a call, and a check that a tensor is plain."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter


class Problem(NamedTuple):
    """The facts from which a backend decides whether it can run a call.

    ``has_affine_norm`` concerns operators that contain a LayerNorm: whether it has weight, bias and an eps above 0.
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
    widths: tuple[int, ...] = ()  # output features of an operator's linear layers


def is_plain_tensor(tensor: Any) -> TypeGuard[Tensor]:
    """Whether an operator may read the elements of ``tensor`` directly by their strides.

    False for subclasses, which may represent other data (quantised, sharded, low rank), and for sparse layouts.
    """
    return type(tensor) in _PLAIN_TENSORS and tensor.layout is torch.strided


_PLAIN_TENSORS = (Parameter, Tensor)

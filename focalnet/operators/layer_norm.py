"""LayerNorm over the last dimension, and its gradients, by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import unpack


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[LayerNorm(x), mean, 1 / standard deviation], or [x, None, None] without norm."""
    return (x, None, None) if eps is None else torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_bwd(
    dnormed: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> Sequence[Tensor | None]:
    dnormed = dnormed.to(x.dtype)
    if statistics[0] is None:
        return dnormed, None, None
    gradients = torch.ops.aten.native_layer_norm_backward(dnormed, x, x.shape[-1:], *statistics, weight, bias, mask)
    return unpack(gradients, mask)

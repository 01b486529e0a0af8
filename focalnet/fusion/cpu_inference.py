"""What every operator of CPU inference asks of a call, and of the weights.

The operators read parameters where the modules have them, at every call. Nothing of a weight is kept between calls, so
nothing can go stale, however a weight is written and whoever writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.problem import Problem, is_plain_tensor
from ..backends.registry import optional_kernel
from .gate import why_not_fused

CPU = torch.device("cpu")


def why_not_call(input: Tensor) -> str | None:
    """Why no operator of CPU inference can take a call with ``input``, whatever the modules are; or None."""
    if torch.is_grad_enabled():
        return "gradients are being computed"
    if reason := why_not_fused(input):
        return reason
    if input.device.type != "cpu":
        return f"expected a tensor on the CPU, got one on {input.device}"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def kernel(operator: str, dtype: torch.dtype, backend: str | None) -> Callable[..., Any] | str:
    """What runs ``operator`` on a map of ``dtype``, or the reason why modules have to."""
    return optional_kernel(Problem(operator, CPU, dtype), backend)


def why_not_weights(weights: Iterable[Tensor | None], dtype: torch.dtype, *owners: nn.Module) -> str | None:
    """Why the operators cannot read ``weights``, parameters of ``owners`` and their parts, or None if they can."""
    for weight in weights:
        if weight is None or (is_plain_tensor(weight) and weight.dtype is dtype and weight.is_cpu):
            continue
        kind = f"{type(weight).__name__}, {weight.layout}, {weight.dtype}, on {weight.device}"
        return f"{_name_of(weight, owners)} is {kind}; expected plain {dtype}"
    return None


def _name_of(weight: Tensor, owners: Iterable[nn.Module]) -> str:
    named = (pair for owner in owners for pair in owner.named_parameters())
    return next((name for name, parameter in named if parameter is weight), "a weight")

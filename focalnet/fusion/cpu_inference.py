"""The checks of a call and its weights that all operators of CPU inference share.

The operators read the modules' parameters at every call. No data of a weight is cached between calls, so writing to a
weight can never leave a stale copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.problem import Problem, is_plain_tensor
from ..backends.registry import optional_kernel
from .gate import why_not_fused

CPU = torch.device("cpu")
# Dtypes of autocast and of the input for which an operator gives what the modules give.
AUTOCAST = {(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)}


def why_not_call(input: Tensor) -> str | None:
    """Why operators of CPU inference cannot run a call with ``input``, regardless of the modules; None if they can."""
    if torch.is_grad_enabled():
        return "gradients are being computed"
    if reason := why_not_fused(input):
        return reason
    if input.device.type != "cpu":
        return f"expected a tensor on the CPU, got one on {input.device}"
    if is_rounding():
        cast = torch.get_autocast_dtype("cpu")
        if (cast, input.dtype) not in AUTOCAST:
            return f"autocast to {cast} is on, and the input is {input.dtype}"
    return None


class Precision(NamedTuple):
    """How a call computes: ``dtype`` is that of its products.

    ``rounded``: autocast is on. Weights may be float32; the operators round them as they read them.
    """

    dtype: torch.dtype
    rounded: bool

    @classmethod
    def of(cls, input: Tensor) -> Precision:
        """That of a call with ``input`` which `why_not_call` does not refuse."""
        return cls(torch.bfloat16, rounded=True) if is_rounding() else cls(input.dtype, rounded=False)


def is_rounding() -> bool:
    """Whether a call that `why_not_call` does not refuse rounds weights of float32: `Precision.rounded`."""
    return torch.is_autocast_enabled("cpu")


def kernel(operator: str, dtype: torch.dtype, backend: str | None) -> Callable[..., Any] | str:
    """The function that runs ``operator`` on a CPU map of ``dtype``, or the reason why the modules must run."""
    return optional_kernel(Problem(operator, CPU, dtype), backend)


def why_not_weights(weights: Iterable[Tensor | None], precision: Precision, *owners: nn.Module) -> str | None:
    """Why the operators cannot read ``weights``, or None. ``owners`` hold the weights and give the name to report."""
    dtypes = (torch.float32, torch.bfloat16) if precision.rounded else (precision.dtype,)
    for weight in weights:
        if weight is None or (is_plain_tensor(weight) and weight.dtype in dtypes and weight.is_cpu):
            continue
        kind = f"{type(weight).__name__}, {weight.layout}, {weight.dtype}, on {weight.device}"
        return f"{_name_of(weight, owners)} is {kind}; expected plain {' or '.join(map(str, dtypes))}"
    return None


def _name_of(weight: Tensor, owners: Iterable[nn.Module]) -> str:
    named = (pair for owner in owners for pair in owner.named_parameters())
    return next((name for name, parameter in named if parameter is weight), "a weight")

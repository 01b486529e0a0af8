"""What every fused operator of CPU inference asks: of a call, whatever the weights are, and of each weight.

The operators read parameters where the modules have them, at every call. Nothing is kept between calls, so nothing can
go stale, however a weight is written and whoever writes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..backends import extension
from ..backends.problem import is_plain_tensor
from ..backends.registry import requested

DTYPES = (torch.float32, torch.bfloat16)


def reason_against_call(input: Tensor, backend: str | None) -> str | None:
    """Why no fused operator can take a call with ``input``, whatever its weights are; or None."""
    if torch.is_grad_enabled():
        return "gradients are being computed"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "the call is being traced or transformed"
    if type(input) is not Tensor:
        return f"expected a plain tensor, got {type(input).__name__}"
    if input.device.type != "cpu" or input.dtype not in DTYPES:
        return f"expected float32 or bfloat16 on the CPU, got {input.dtype} on {input.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if (wanted := requested(backend)) not in (None, "cpu"):
        return f"backend {wanted!r} was asked for"
    return extension.missing()


def reason_against_weights(weights: Iterable[Tensor | None], *owners: nn.Module) -> str | None:
    """Why the operators cannot read ``weights``, parameters of ``owners`` and their parts, or None if they can."""
    dtype = None
    for weight in weights:
        if weight is None:
            continue
        dtype = dtype or weight.dtype
        if is_plain_tensor(weight) and weight.dtype is dtype and dtype in DTYPES and weight.is_cpu:
            continue
        name = _name_of(weight, owners)
        return f"{name} is {type(weight).__name__}, {_facts(weight)}; expected plain float32 or bfloat16, all alike"
    return None


def reason_against_dtype(input: Tensor, *found: tuple | str) -> str | None:
    """The first reason in ``found``, or why operators with these arguments cannot take ``input``, or None."""
    for arguments in found:
        if isinstance(arguments, str):
            return arguments
        if arguments[0].dtype is not input.dtype:
            return f"expected the weights' {arguments[0].dtype}, got {input.dtype}"
    return None


def _name_of(weight: Tensor, owners: Iterable[nn.Module]) -> str:
    named = (pair for owner in owners for pair in owner.named_parameters())
    return next((name for name, parameter in named if parameter is weight), "a weight")


def _facts(weight: Tensor) -> str:
    return f"{weight.layout}, {weight.dtype}, on {weight.device}"

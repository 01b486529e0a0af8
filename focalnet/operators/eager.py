"""Calls that nothing observes go straight to the backend that ran their like before.

PyTorch's dispatch of an operator written in Python and the checks of its arguments cost more than the host needs to
launch the kernels. What the checks and the choice of a backend find depends on a few facts of the arguments alone, the
`key` of a call: so a call whose key has passed once need not be checked again. And the operator is there for those
who look at it (autograd, compilers, tracers, modes, transformations): where none does, it is left out. Profilers and
the level of logging change nothing: a profile shows the name of the operator all the same, and a choice is logged once
for each kind of call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.problem import is_plain_tensor
from ..backends.registry import choose, requested

_MAX_KEYS = 4096
_facts = operator.attrgetter("shape", "dtype", "device")
_runs: dict[tuple[Any, ...], Callable[..., Any]] = {}


def key(
    name: str, tensors: tuple[Any, ...], focal_weights: Sequence[Tensor], backend: str | None
) -> tuple[Any, ...] | None:
    """What decides whether a call of the operator ``name`` is valid and which backend runs it.

    None where the call has to go through the operator, or where its arguments are not even tensors.
    """
    if _is_observed() or type(focal_weights) not in (list, tuple):
        return None
    tensors = (*tensors, *focal_weights)
    wants_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if not is_plain_tensor(tensor) or tensor.is_neg() or (wants_grad and tensor.requires_grad):
            return None
    return (name, len(focal_weights), requested(backend), *map(_facts, tensors))


def known(key: tuple[Any, ...] | None) -> Callable[..., Any] | None:
    """The function of the backend that takes calls with this key, as far as one has passed before."""
    if key is None:
        return None
    run = _runs.get(key)
    if run is None or not torch._C._autograd._profiler_enabled():
        return run
    return functools.partial(_profiled, f"focalnet::{key[0]}", run)


def _profiled(name: str, run: Callable[..., Any], *arguments: object) -> Tensor:
    with torch.profiler.record_function(name):
        return run(*arguments)


def remember(
    key: tuple[Any, ...], name: str, ctx: Tensor, focal_weights: Sequence[Tensor], backend: str | None
) -> None:
    """The arguments have been checked: choose their backend for all calls with this key."""
    if len(_runs) >= _MAX_KEYS:
        _runs.clear()
    if ctx.device.type in ("cpu", "cuda"):
        _runs[key] = choose(name, ctx, focal_weights, backend)


def _is_observed() -> bool:
    """Whether anything could tell an operator from the function that it runs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )

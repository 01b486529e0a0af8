"""A shortcut in eager mode: repeated calls go directly to the backend, without checks and without the dispatcher.

Dispatching an operator written in Python and checking its arguments take longer than launching the kernels. The result
of the checks and the choice of a backend depend only on a few facts of the arguments, the `key` of a call, so a call
with a known key is not checked again. The operator itself is needed only by autograd, compilers, tracers, modes and
transformations. If none of them is active, it is skipped. Profilers and the logging level do not change which code
runs: a profile still shows the name of the operator, and each choice is logged once for each kind of call.
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
    """The facts that determine whether a call of the operator ``name`` is valid, and which backend runs it.

    None if the call must go through the operator, or if an argument is not a plain tensor.
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
    """The backend's function for calls with this key, or None if no such call has been checked yet."""
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
    """Choose the backend for all calls with this key. The arguments must have been checked."""
    if len(_runs) >= _MAX_KEYS:
        _runs.clear()
    if ctx.device.type in ("cpu", "cuda"):
        _runs[key] = choose(name, ctx, focal_weights, backend)


def _is_observed() -> bool:
    """Whether something is active that needs to see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )

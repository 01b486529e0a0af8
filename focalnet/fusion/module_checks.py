"""Whether calling a module does just what its class says, so that an operator may take its parameters instead."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
import torch.fx
from torch import nn

from ..backends.problem import is_plain_tensor

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def part(module: nn.Module, name: str) -> nn.Module:
    """The child ``name`` of ``module``, by dictionary: it is known to be there."""
    child: Any = module._modules[name]
    return child


def is_changed(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says: hooks, or a forward of its own."""
    # Asked of every part of a block in every call: plain dictionary look-ups, no attribute protocol.
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks are called when ``module`` is."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def all_are_watched() -> bool:
    """Whether hooks hang on all modules at once, as profilers and counters of operations have them."""
    return not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook()


def is_proxy(value: object) -> bool:
    """Whether torch.fx traces symbolically: ``value`` has no shape, dtype or device that a branch could ask for."""
    return isinstance(value, torch.fx.Proxy)


def is_plain(module: nn.Module, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether ``module`` is a ``kind``, no subclass of it, unchanged, with ordinary tensors as parameters.

    Adapters, quantisation, sharding and parametrisation show in one of these.
    """
    if type(module) is not kind or is_changed(module):
        return False
    return all(p is None or is_plain_tensor(p) for p in module._parameters.values())


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether ``module`` is the GELU by erf: torch's, or transformers', whose class may stand for another one."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module).__name__ == "GELUActivation" and module.act is nn.functional.gelu


def is_mean(module: nn.Module) -> bool:
    """Whether ``module`` pools (B, C, N) to the mean of each channel, and does nothing else when it is called."""
    return type(module) is nn.AdaptiveAvgPool1d and module.output_size in (1, (1,)) and not is_changed(module)

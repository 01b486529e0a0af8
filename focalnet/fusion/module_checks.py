"""Checks that a call of a module does only what its class defines, so that an operator may replace the call."""

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
    """Whether ``module`` has hooks or a forward bound to the instance."""
    # This runs for every part of a block, so it reads the dictionary and avoids nn.Module's attribute protocol.
    return "forward" in module.__dict__ or is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has forward or backward hooks."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def all_are_watched() -> bool:
    """Whether global module hooks are registered, as profilers and FLOP counters do."""
    return not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook()


def is_proxy(value: object) -> bool:
    """Whether ``value`` is a torch.fx proxy, which has no concrete shape, dtype or device to branch on."""
    return isinstance(value, torch.fx.Proxy)


def is_plain(module: nn.Module, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether ``module`` is exactly a ``kind``, unchanged, with plain tensors as parameters.

    Adapters, quantisation, sharding and parametrisation each violate one of these conditions.
    """
    if type(module) is not kind or is_changed(module):
        return False
    return all(p is None or is_plain_tensor(p) for p in module._parameters.values())


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether ``module`` is the exact (erf) GELU of torch or transformers. transformers' class has other variants."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module).__name__ == "GELUActivation" and module.act is nn.functional.gelu


def is_mean(module: nn.Module) -> bool:
    """Whether ``module`` is an unchanged pooling of (B, C, N) to the mean of each channel."""
    return type(module) is nn.AdaptiveAvgPool1d and module.output_size in (1, (1,)) and not is_changed(module)

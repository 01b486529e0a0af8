"""What is made of a module's parameters once, kept as long as the module lives, and made again when one changed.

A parameter counts as changed when it was replaced, moved or written in place. Writing to it through ``.data`` is the
one change that PyTorch does not count: call ``model.train()`` (as every training loop does) or `forget` after it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import extension
from .backends import requested
from .plain import is_hooked


@dataclass(frozen=True)
class Packed:
    """The arguments made of a module, or the reason why there are none, and what tells that this still holds."""

    arguments: tuple | None
    reason: str | None
    settings: tuple
    modules: list[nn.Module]
    # For each module, whether it has hooks, and its forward if that is not its class's.
    changed: list[tuple]
    # The dictionaries in which modules and parameters hang, with their content at the time.
    registries: list[tuple[dict, list]]
    # Aliases keep the storage alive: no other tensor can take its address.
    parameters: list[tuple[Tensor, Tensor, int]]

    def is_current(self, settings: tuple) -> bool:
        return (
            self.settings == settings
            and list(map(_changes, self.modules)) == self.changed
            and all(_holds(registry, content) for registry, content in self.registries)
            and all(p.data_ptr() == alias.data_ptr() and _version(p) == v for p, alias, v in self.parameters)
        )


_packed: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def packed_of(
    owner: nn.Module, settings: tuple, reason: Callable[[], str | None], pack: Callable[[], tuple]
) -> Packed:
    """What is packed of ``owner``; where it is missing or stale, ``pack()``, unless ``reason()`` speaks against it.

    ``settings`` is what is neither module nor parameter and yet decides the result.
    """
    packed = _packed.get(owner)
    if packed is None or not packed.is_current(settings):
        modules = list(owner.modules())[1:]
        registries = [r for m in (owner, *modules) for r in (m._modules, m._parameters) if r]
        why_not = reason() or _unusual_parameter(owner)
        packed = Packed(
            arguments=None if why_not else pack(),
            reason=why_not,
            settings=settings,
            modules=modules,
            changed=list(map(_changes, modules)),
            registries=[(registry, list(registry.values())) for registry in registries],
            parameters=[(p, p.detach(), _version(p)) for p in owner.parameters()],
        )
        _packed[owner] = packed
    return packed


def arguments_of(owner: nn.Module) -> tuple:
    """The arguments that `packed_of` has just made, or found current."""
    return _packed[owner].arguments


def forget(owner: nn.Module) -> None:
    """Drop what was packed of ``owner``."""
    _packed.pop(owner, None)


def reason_against_call(input: Tensor, backend: str | None) -> str | None:
    """Why no fused operator of inference can take a call with ``input``, whatever its weights are; or None."""
    if torch.is_grad_enabled():
        return "gradients are being computed"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "the call is being traced or transformed"
    if type(input) is not Tensor or input.device.type != "cpu" or input.dtype != torch.float32:
        return f"expected a plain float32 tensor on the CPU, got {input.dtype} on {input.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if (wanted := requested(backend)) not in (None, "cpu"):
        return f"backend {wanted!r} was asked for"
    return extension.missing()


def _changes(module: nn.Module) -> tuple:
    return is_hooked(module), module.__dict__.get("forward")


def _holds(registry: dict, content: list) -> bool:
    return len(registry) == len(content) and all(map(operator.is_, registry.values(), content))


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _unusual_parameter(owner: nn.Module) -> str | None:
    for name, parameter in owner.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or parameter.is_inference():
            return f"{name} is {parameter.dtype} on {parameter.device}, or was made in inference mode"
    return None

"""What is made of a module's parameters once, kept as long as the module lives, and made again when one changed.

A parameter counts as changed when it was replaced, moved or written in place. Writing to it through ``.data`` is the
one change that PyTorch does not count: call ``model.train()`` (as every training loop does) or `forget` after it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from . import extension
from .backends import requested
from .plain import HOOKS

_SETTINGS = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Packed:
    """The arguments made of a module, or the reason why there are none, and what tells that this still holds.

    Asked for every block in every call, when the weights of the block before have left little else in the caches: so
    everything is compared in a few passes over flat lists.
    """

    arguments: tuple | None
    reason: str | None
    settings: tuple
    # The module's own settings. Not all its attributes: what is bound to it would keep it alive.
    own: dict[str, object]
    # Where modules hang, and the attributes of those in it, and what hung there; the same of parameters.
    attributes: list[dict]
    values: list
    registries: list[dict]
    registered: list[Tensor | None]
    # The hooks of all modules in it, and which there were.
    hooks: list[dict]
    hooked: list[bool]
    parameters: list[Tensor]
    # Aliases keep the storage alive: no other tensor can take its address.
    aliases: list[Tensor]
    addresses: list[int]
    versions: list[int]

    @classmethod
    def of(cls, owner: nn.Module, settings: tuple, reason: str | None, arguments: tuple | None) -> Packed:
        modules = list(owner.modules())[1:]
        attributes = [owner._modules, *(d for module in modules for d in (module.__dict__, module._modules) if d)]
        registries = [owner._parameters, *(module._parameters for module in modules if module._parameters)]
        hooks = [module.__dict__[name] for module in modules for name in HOOKS]
        parameters = list(owner.parameters())
        return cls(
            arguments=arguments,
            reason=reason,
            settings=settings,
            own={name: value for name, value in owner.__dict__.items() if isinstance(value, _SETTINGS)},
            attributes=attributes,
            values=_values(attributes),
            registries=registries,
            registered=_values(registries),
            hooks=hooks,
            hooked=list(map(bool, hooks)),
            parameters=parameters,
            aliases=[parameter.detach() for parameter in parameters],
            addresses=[parameter.data_ptr() for parameter in parameters],
            versions=list(map(_version, parameters)),
        )

    def is_current(self, owner: nn.Module, settings: tuple) -> bool:
        registered = _values(self.registries)
        try:
            return (
                self.settings == settings
                and list(map(owner.__dict__.get, self.own)) == list(self.own.values())
                and _values(self.attributes) == self.values
                and len(registered) == len(self.registered)
                and all(map(operator.is_, registered, self.registered))
                and list(map(bool, self.hooks)) == self.hooked
                and [parameter.data_ptr() for parameter in self.parameters] == self.addresses
                and [parameter._version for parameter in self.parameters] == self.versions
            )
        except (RuntimeError, ValueError):  # an attribute is another tensor or array now: no single answer
            return False


_packed: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def packed_of(
    owner: nn.Module, settings: tuple, reason: Callable[[], str | None], pack: Callable[[], tuple]
) -> Packed:
    """What is packed of ``owner``; where it is missing or stale, ``pack()``, unless ``reason()`` speaks against it.

    ``settings`` is what hangs neither in ``owner`` nor in a module in it and yet decides the result.
    """
    packed = _packed.get(owner)
    if packed is None or not packed.is_current(owner, settings):
        why_not = reason() or _unusual_parameter(owner)
        packed = _packed[owner] = Packed.of(owner, settings, why_not, None if why_not else pack())
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


def _values(dictionaries: list[dict]) -> list:
    return [*chain.from_iterable(map(dict.values, dictionaries))]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _unusual_parameter(owner: nn.Module) -> str | None:
    for name, parameter in owner.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or parameter.is_inference():
            return f"{name} is {parameter.dtype} on {parameter.device}, or was made in inference mode"
    return None

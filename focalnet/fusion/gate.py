"""Decides whether an operator may replace modules: nothing observes the call, and the modules have not changed.

Observers are compilers, tracers, transformations and hooks on all modules. They need to see the individual steps.

Whether an operator may run depends on the modules' classes, settings, hooks and parameters: thousands of look-ups for
a small network before every forward. Python needs most of a millisecond for them. The extension compares everything
with a record of the last check (csrc/structure.h) in a fraction of that time. Only the record and the answer are
stored, never a weight. If anything differs from the record, the check runs again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import extension

_Structure = None if extension.missing() else extension.structure()


def why_not_fused(input: object) -> str | None:
    """Why modules must be called one by one for ``input``, regardless of the modules; None if they need not be."""
    if type(input) not in (Tensor, nn.Parameter):
        return f"expected a plain tensor, got {type(input).__name__}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the call is being traced"
    if torch._C._are_functorch_transforms_active():
        return "the call is being transformed"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    return None


class _Slot(int):
    """A placeholder for a tensor in a stored answer: the tensor's index among the module's parameters."""


class _Nested(list):
    """A list in a stored answer that contains placeholders."""


class _Known(NamedTuple):
    settings: tuple
    structure: Any
    template: Any  # the answer with a _Slot in place of each tensor


def while_unchanged(question: Callable) -> Callable:
    """Cache ``question(module, *settings)`` until the structure of the module or a setting changes.

    The question may read only what csrc/structure.h lists. It must not depend on the shape of a parameter, for
    example. The answer may contain parameters of the module in lists. A cached answer is returned with the module's
    current parameters. A reason (a string) is not cached.
    """
    known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

    @functools.wraps(question)
    def asked(module: nn.Module, *settings: object) -> Any:
        if _Structure is None or torch.compiler.is_compiling():
            return question(module, *settings)
        last = known.get(module)
        if last is not None and last.settings == settings:
            parameters = last.structure.parameters_of(module)
            if parameters is not None:
                return _filled(last.template, parameters)
        structure = _Structure(module)
        answer = question(module, *settings)
        # Compare again, because another thread may have changed the module in the meantime.
        parameters = structure.parameters_of(module)
        slots = None if parameters is None or isinstance(answer, str) else _slots(answer, parameters)
        if slots is not None:
            known[module] = _Known(settings, structure, _template(answer, slots))
        return answer

    return asked


def _slots(answer: Any, parameters: list[Tensor | None]) -> dict[int, _Slot] | None:
    """The index of each parameter by its id, or None if a tensor of ``answer`` has no unique index."""
    slots = {id(p): _Slot(index) for index, p in enumerate(parameters) if p is not None}
    # A tensor shared by two modules has two indices, and either module may later get another tensor.
    is_shared = len(slots) < sum(p is not None for p in parameters)
    return None if is_shared or not all(id(tensor) in slots for tensor in _tensors(answer)) else slots


def _tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, (tuple, list)):
        return [tensor for item in answer for tensor in _tensors(item)]
    return [answer] if isinstance(answer, Tensor) else []


def _template(answer: Any, slots: dict[int, _Slot]) -> Any:
    if _tensors(answer) and not isinstance(answer, Tensor):
        return _Nested(_template(item, slots) for item in answer)
    return slots[id(answer)] if isinstance(answer, Tensor) else answer


def _filled(template: Any, parameters: list[Tensor | None]) -> Any:
    kind = type(template)
    if kind is _Nested:
        return [_filled(item, parameters) for item in template]
    return parameters[template] if kind is _Slot else template

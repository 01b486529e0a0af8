"""Whether an operator may take the place of modules: nobody watches the call, and the modules are what they were.

Watching means that somebody wants to see the single steps: compilers, tracers, transformations, hooks on all modules.

What the modules are depends on their classes, settings, hooks and parameters: thousands of look-ups for a small
network, before every forward. Python takes most of a millisecond for them. The extension compares all of that with a
record (csrc/structure.h) in a fraction of it. The record and the answer are kept, never a weight. Where anything
differs from the record, the question is asked anew.
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
    """Why modules have to be called one by one in a call with ``input``, whatever they are; or None."""
    if type(input) not in (Tensor, nn.Parameter):
        return f"expected a plain tensor, got {type(input).__name__}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the call is being traced"
    if torch._C._are_functorch_transforms_active():
        return "the call is being transformed"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    return None


class _Slot(int):
    """The place of a tensor in an answer: its index among the parameters of the module."""


class _Nested(list[Any]):
    """A part of an answer that holds tensors."""


class _Known(NamedTuple):
    settings: tuple[Any, ...]
    structure: Any
    template: Any  # the answer, with a _Slot for each tensor


def while_unchanged(question: Callable[..., Any]) -> Callable[..., Any]:
    """``question(module, *settings)``, asked again only where the module, or a setting, is another.

    The question may read what csrc/structure.h lists, and nothing else: no shape of a parameter, say. The answer may
    hold parameters of the module, in lists: what is returned holds those that the module has now. A reason (a string)
    is not kept.
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
        # Compared again: another thread may have changed the module meanwhile.
        parameters = structure.parameters_of(module)
        slots = None if parameters is None or isinstance(answer, str) else _slots(answer, parameters)
        if slots is not None:
            known[module] = _Known(settings, structure, _template(answer, slots))
        return answer

    return asked


def _slots(answer: Any, parameters: list[Tensor | None]) -> dict[int, _Slot] | None:
    """The place of each parameter by its id; None where the places in ``answer`` would not be certain."""
    slots = {id(p): _Slot(index) for index, p in enumerate(parameters) if p is not None}
    # A tensor that two modules share has two places, and either may be given another tensor later.
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

"""Decides whether an operator may replace modules: nothing observes the call, and the modules have not changed.

Observers are compilers, tracers, transformations and hooks on all modules. They need to see the individual steps.

Whether an operator may run depends on the modules' classes, settings, hooks and parameters: thousands of look-ups for
a small network before every forward. Python needs most of a millisecond for them. The extension compares everything
with a record of the last check (csrc/structure.h) in a fraction of that time. Only the record and the answer are
stored, never a weight. If anything differs from the record, the check runs again.
"""

from __future__ import annotations

import functools
import operator
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
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the call is being traced"
    if torch._C._are_functorch_transforms_active():
        return "the call is being transformed"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    return None


class _Known(NamedTuple):
    settings: tuple[Any, ...]
    structure: Any
    answer: _Answer


def while_unchanged(question: Callable[..., Any]) -> Callable[..., Any]:
    """Cache ``question(module, *settings)`` until the structure of the module or a setting changes.

    The question may read what csrc/structure.h lists, and nothing else: no shape of a parameter, for example. The
    answer may hold parameters of the module in nested lists. What is returned holds those that the module has now, in
    tuples. A reason (a string) is not kept.
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
                return last.answer.with_parameters(parameters)
        structure = _Structure(module)
        answer = question(module, *settings)
        # Compare again, because another thread may have changed the module in the meantime.
        parameters = structure.parameters_of(module)
        if parameters is not None and not isinstance(answer, str):
            kept = _Answer.of(answer, parameters)
            if kept is not None:
                known[module] = _Known(settings, structure, kept)
        return answer

    return asked


class _Answer:
    """An answer without its tensors: how to put it together from the parameters of the module.

    ``constants``, the parameters and what the ``steps`` make are one list of values. A step takes some of them for a
    tuple, which is the next value. The last is the answer.
    """

    def __init__(self, constants: list[Any], steps: list[Callable[[list[Any]], tuple[Any, ...]]]) -> None:
        self._constants = constants
        self._steps = steps

    @classmethod
    def of(cls, answer: Any, parameters: list[Tensor | None]) -> _Answer | None:
        """None where the place of a tensor among the parameters is not certain."""
        places = {id(p): index for index, p in enumerate(parameters) if p is not None}
        # A tensor that two modules share has two places, and either may be given another tensor later.
        is_shared = len(places) < sum(p is not None for p in parameters)
        if is_shared or not all(id(tensor) in places for tensor in _tensors(answer)):
            return None
        constants: list[Any] = []
        tuples: list[list[tuple[str, int]]] = []

        def place(item: Any) -> tuple[str, int]:
            if isinstance(item, Tensor):
                return "parameter", places[id(item)]
            if not _tensors(item):
                constants.append(item)
                return "constant", len(constants) - 1
            members = [place(member) for member in item]
            tuples.append(members)
            return "step", len(tuples) - 1

        tuples.append([place(answer)])
        first = {"constant": 0, "parameter": len(constants), "step": len(constants) + len(parameters)}
        steps = [_taker([first[kind] + index for kind, index in members]) for members in tuples]
        return cls(constants, steps)

    def with_parameters(self, parameters: list[Tensor | None]) -> Any:
        values = self._constants + parameters
        for step in self._steps:
            values.append(step(values))
        return values[-1][0]


def _taker(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return operator.itemgetter(*places)  # a tuple, in C
    return lambda values: (values[places[0]],)


def _tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, (tuple, list)):
        return [tensor for item in answer for tensor in _tensors(item)]
    return [answer] if isinstance(answer, Tensor) else []

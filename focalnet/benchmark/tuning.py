"""Measures which backend, and which plan of Triton, is the fastest for the operator's calls in a model.

Forward and backward of `focal_modulation` at the sizes of each stage. `focalnet tune` keeps the result (see
`focalnet.backends.tuned`), bench/gpu/gpu_sweep.py writes every time that was measured.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import tuned
from ..backends.problem import Problem
from ..backends.registry import backends, choose
from ..operators.norm_linear import padded_empty
from .operators import Stage, operands, stages
from .runtimes import Case
from .timing import measure

OPERATORS = ("focal_modulation", "focal_modulation_bwd")
TABLE = "table"

Call = Callable[[int], object]  # with a running number, as `timing.measure` wants it
# Seconds of each of several calls, by name.
Timer = Callable[[dict[str, Call]], dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """Of one kind of call: seconds of each backend, and of each plan of Triton with its configuration.

    ``failed``: what could not run, with the reason.
    """

    operator: str
    stage: Stage
    problem: Problem
    seconds: dict[str, float]
    plans: dict[str, tuple[dict[str, Any], float]]
    failed: dict[str, str]

    @property
    def choice(self) -> tuned.Choice:
        """The fastest backend, with Triton's fastest plan if it is another than that of the table."""
        seconds, plan = dict(self.seconds), None
        if self.plans:
            best = min(self.plans, key=lambda name: self.plans[name][1])
            if best != TABLE:
                plan, seconds["triton"] = self.plans[best]
        return tuned.Choice(min(seconds, key=lambda name: seconds[name]), plan, seconds)


def able() -> list[str]:
    """The GPU backends that can run here."""
    return [name for name in tuned.BACKENDS if backends()[name] is None]


def timer(device: str, rounds: int) -> Timer:
    """Median seconds of each call; the calls take turns."""

    def time(calls: dict[str, Call]) -> dict[str, float]:
        return {name: statistics.median(found.seconds) for name, found in measure(calls, device, rounds).items()}

    return time


def tune(case: Case, names: Sequence[str], time: Timer, with_plans: bool = True) -> Iterator[Measured]:
    """Measure every kind of call of ``case`` on the backends ``names``, one after another."""
    for stage in stages(case):
        for operator in OPERATORS:
            yield _measured(operator, stage, case, names, time, with_plans)


def _measured(
    operator: str, stage: Stage, case: Case, names: Sequence[str], time: Timer, with_plans: bool
) -> Measured:
    arguments = _Arguments(operator, stage, case)
    failed: dict[str, str] = {}
    made = {name: _able(functools.partial(arguments.call, name), name, failed) for name in names}
    seconds = time({name: call for name, call in made.items() if call is not None})
    plans = _plans(arguments, time, failed) if with_plans and "triton" in seconds else {}
    return Measured(operator, stage, arguments.problem, seconds, plans, failed)


def _plans(arguments: _Arguments, time: Timer, failed: dict[str, str]) -> dict[str, tuple[dict[str, Any], float]]:
    """Configuration and seconds of each plan. They do not take turns: a few are far slower than the others."""
    found = {}
    for number, (config, run) in enumerate(arguments.plans()):
        name = f"plan {number}" if number else TABLE
        if (call := _able(functools.partial(_numbered, run), name, failed)) is not None:
            found[name] = asdict(config), time({name: call})[name]
    return found


def _able(make: Callable[[], Call], name: str, failed: dict[str, str]) -> Call | None:
    """The call, if it can be made and run; else None, and ``failed`` has the reason."""
    try:
        call = make()
        call(0)
    # A plan may want more than the device has; torch, Triton and the driver have an exception each for that.
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    return call


def _numbered(run: Callable[[], object]) -> Call:
    return lambda number: run()


class _Arguments:
    """Of one kind of call, as a model makes them: views of one projection, every gradient asked for, three of them as
    views of one gradient."""

    def __init__(self, operator: str, stage: Stage, case: Case) -> None:
        self.operator = operator
        projected, sizes, self.focal_weights, self.weight = operands(stage, case)
        self.q, self.ctx, self.gates = projected.split(sizes, -1)
        self.gradients = padded_empty(projected, projected.shape).split(sizes, -1)
        self.bias = torch.zeros_like(self.weight[0])
        self.dout = torch.ones_like(self.q, memory_format=torch.contiguous_format)
        kernel_sizes = tuple(tuple(weight.shape[2:]) for weight in self.focal_weights)
        self.problem = Problem(operator, self.ctx.device, self.ctx.dtype, *self.ctx.shape, kernel_sizes)

    def call(self, backend: str) -> Call:
        out = self.gradients if self._is_backward else None
        function = choose(self.operator, self.ctx, self.focal_weights, backend, out)
        forward = (self.q, self.ctx, self.gates, self.focal_weights, self.weight, self.bias, False)
        arguments = (self.dout, *forward, [True] * 6) if self._is_backward else forward
        return lambda number: function(*arguments)

    def plans(self) -> Iterator[tuple[Any, Callable[[], object]]]:
        """(configuration, function that runs it) of each plan of Triton, that of the table first."""
        from ..backends import triton_plans

        return triton_plans.candidates(self.operator, self._by_name(), (True,) * 6 if self._is_backward else ())

    def _by_name(self) -> dict[str, Tensor]:
        from ..backends.triton import WRITTEN
        from ..backends.triton_plans import FOCAL_WEIGHTS

        operands = {"ctx": self.ctx, "gates": self.gates}
        operands |= dict(zip(FOCAL_WEIGHTS, self.focal_weights, strict=False))
        operands |= {"q": self.q, "weight": self.weight, "bias": self.bias}
        if not self._is_backward:
            return operands
        return operands | {"dout": self.dout} | dict(zip(WRITTEN, self.gradients, strict=True))

    @property
    def _is_backward(self) -> bool:
        return self.operator.endswith("_bwd")

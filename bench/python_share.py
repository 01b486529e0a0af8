"""Python's share of a forward: all of its time that is not spent inside an operator.

    python bench/python_share.py [--variant tiny_lrf --size 224 --batch 1] [--write]

The time of a forward is dominated by its operators and varies by more than Python takes, so the share is no difference
of two measurements. The operators are timed within each forward, and the rest is Python's: modules, checks, the choice
of operators, views. The clock's own time, about 0.1 us an operator, is counted as Python's too.
Float32, inference, on a CPU; with --write the row goes to bench/results/<device>/python_share.json. Takes seconds.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from focalnet.backends import registry
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case, ours
from focalnet.benchmark.timing import WARM_UP, Timing

# What a forward computes with, as the profiler names it, and where Python finds it.
OPERATORS = {
    "focalnet::cpu_block": (registry._REGISTRY["cpu"].operators, "block"),
    "focalnet::cpu_patch_embed": (registry._REGISTRY["cpu"].operators, "patch_embed"),
    "focalnet::cpu_norm_mean": (registry._REGISTRY["cpu"].operators, "norm_mean"),
    "focalnet::cpu_linear": (registry._REGISTRY["cpu"].operators, "linear"),
}
# These compute nothing in inference, so their time is Python's.
VIEWS = {
    "aten::permute",
    "aten::view",
    "aten::flatten",
    "aten::transpose",
    "aten::to",
    "aten::detach",
    "aten::dropout",
}

console = Console()


@dataclass
class Share:
    """Of each forward: seconds outside operators and in all, and how many operators it called."""

    python: Timing = field(default_factory=Timing)
    whole: Timing = field(default_factory=Timing)
    operators: int = 0


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    batch: Annotated[int, typer.Option(help="Images in one pass.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Forwards to measure.")] = 100,
    keep: Annotated[bool, typer.Option("--write", help="Put the row among the committed ones.")] = False,
) -> None:
    """Measure, print milliseconds, and with --write keep the row."""
    case = Case(variant, size, batch)
    images = case.images(0)
    with timed_operators() as inside, torch.inference_mode():
        # Made here, since a model keeps the operators that it once found.
        model = ours(case)
        share = measured(lambda: model(images), inside, rounds)
    environment = facts()
    found = {**row(share, case), "runtime": "focalnet", **environment}
    console.print(table(found))
    if keep:
        write([found], "python_share", environment["device"])


@contextlib.contextmanager
def timed_operators(operators: dict[str, tuple[object, str]] = OPERATORS) -> Iterator[list[float]]:
    """Seconds of every operator that runs inside the ``with`` block, in the order in which they end."""
    inside: list[float] = []
    undo = contextlib.ExitStack()
    with undo:
        for owner, name in operators.values():
            operator = owner[name] if isinstance(owner, dict) else getattr(owner, name)
            _put(owner, name, _timed(operator, inside))
            undo.callback(_put, owner, name, operator)
        yield inside


def _put(owner: object, name: str, operator: Callable) -> None:
    if isinstance(owner, dict):
        owner[name] = operator
    else:
        setattr(owner, name, operator)


def _timed(operator: Callable, inside: list[float]) -> Callable:
    def timed(*arguments: object, **named: object) -> object:
        start = time.perf_counter()
        result = operator(*arguments, **named)
        inside.append(time.perf_counter() - start)
        return result

    return timed


def measured(call: Callable[[], object], inside: list[float], rounds: int) -> Share:
    """The share of ``call``, ``rounds`` times, one after the other; ``inside`` is that of `timed_operators`.

    Raises:
        RuntimeError: an operator ran that is not timed, so that its time would pass for Python's.
    """
    for _ in range(WARM_UP):
        call()
    if untimed := sorted(_top_level(call) - OPERATORS.keys() - VIEWS):
        raise RuntimeError(f"{', '.join(untimed)} ran, which bench/python_share.py does not time")
    gc.collect()
    share = Share()
    for _ in range(rounds):
        inside.clear()
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
        share.whole.seconds.append(whole)
        share.python.seconds.append(whole - sum(inside))
        share.operators = len(inside)
    return share


def _top_level(call: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() if event.cpu_parent is None and "::" in event.name}


def row(share: Share, case: Case) -> dict[str, object]:
    """As it is written: the share under the names that every row has for times."""
    which = {"variant": case.variant, "size": case.size, "batch": case.batch, "dtype": case.dtype}
    whole = share.whole.row()["median_s"]
    return {"case": "python share", **which, **share.python.row(), "forward_s": whole, "operators": share.operators}


def table(row: dict[str, object]) -> Table:
    shown = Table(title=f"Python's share of a forward, {row['variant']}, {row['size']}, batch {row['batch']}")
    for name in ("Python, ms", "fastest, ms", "whole forward, ms", "operators"):
        shown.add_column(name, justify="right")
    times = (row["median_s"], row["fastest_s"], row["forward_s"])
    shown.add_row(*(f"{1e3 * time:.2f}" for time in times), str(row["operators"]))
    return shown


if __name__ == "__main__":
    typer.run(main)

"""Python's share of a forward: the time that is not spent inside an operator.

    python bench/python_share.py [--variant tiny_lrf --size 224 --batch 1] [--write]

Operators dominate the time of a forward, and that time varies by more than Python's share. So the share cannot be
measured as the difference of two runs. Instead the profiler records when each operator of one forward begins and ends.
The rest of that forward is Python's: modules, checks, the choice of operators, and passing their arguments to C++. The
profiler's own work, about a microsecond for each operator, is counted as Python's too. Float32, inference, on a CPU.
With --write the rows go to bench/results/<device>/python_share.json. Takes seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case, ours, theirs
from focalnet.benchmark.timing import WARM_UP, Timing

# Operators of ours whose bodies are Python: what they do would pass for an operator's work.
IN_PYTHON = ("gated_aggregation", "focal_modulation")
FORWARD = "one forward"

console = Console()


@dataclass
class Share:
    """Of each forward: seconds outside operators and in all, and how many operators it called."""

    python: Timing = field(default_factory=Timing)
    whole: Timing = field(default_factory=Timing)
    operators: int = 0


def main(
    variant: Annotated[str, typer.Option(help="Name of a published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Number of forwards to measure.")] = 50,
    keep: Annotated[bool, typer.Option("--write", help="Write the rows to bench/results/.")] = False,
) -> None:
    """Measure, print milliseconds, and with --write keep the rows."""
    case = Case(variant, size, batch)
    environment = facts()
    rows = []
    for name, make in (("focalnet", ours), ("transformers", theirs)):
        model, images = make(case), case.images(0)
        with torch.inference_mode():
            share = measured(lambda model=model, images=images: model(images), rounds)
        rows.append({**row(share, case), "runtime": name, **environment})
    console.print(table(rows))
    if keep:
        write(rows, "python_share", environment["device"])


def measured(call: Callable[[], object], rounds: int) -> Share:
    """The share of ``call``, ``rounds`` times, one after the other.

    Raises:
        RuntimeError: an operator with a body in Python ran, so that the share would come out too small.
    """
    for _ in range(WARM_UP):
        call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            with record_function(FORWARD):
                call()
    share = Share()
    for event in profiler.events():
        if event.name == FORWARD:
            inside = [child.time_range.elapsed_us() for child in event.cpu_children]
            share.whole.seconds.append(event.time_range.elapsed_us() * 1e-6)
            share.python.seconds.append((event.time_range.elapsed_us() - sum(inside)) * 1e-6)
            share.operators = len(inside)
        elif event.name.removeprefix("focalnet::").removesuffix("_bwd") in IN_PYTHON:
            raise RuntimeError(f"{event.name} ran, whose body is Python: expected a call of C++ operators alone")
    return share


def row(share: Share, case: Case) -> dict[str, object]:
    """As it is written: the share under the names that every row has for times."""
    which = {"variant": case.variant, "size": case.size, "batch": case.batch, "dtype": case.dtype}
    whole = share.whole.row()["median_s"]
    return {"case": "python share", **which, **share.python.row(), "forward_s": whole, "operators": share.operators}


def table(rows: list[dict]) -> Table:
    first = rows[0]
    shown = Table(title=f"Python's share of a forward, {first['variant']}, {first['size']}, batch {first['batch']}")
    shown.add_column("runtime", no_wrap=True)
    for name in ("Python, ms", "fastest, ms", "whole forward, ms", "operators"):
        shown.add_column(name, justify="right")
    for row in rows:
        times = (row["median_s"], row["fastest_s"], row["forward_s"])
        shown.add_row(row["runtime"], *(f"{1e3 * time:.2f}" for time in times), str(row["operators"]))
    return shown


if __name__ == "__main__":
    typer.run(main)

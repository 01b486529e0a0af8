"""Measures how much inference slows down on cores that other processes use too: each runtime, float32, on this CPU.

    python bench/shared_cores.py [--variant tiny_lrf --size 224 --batch 1] [--runtime focalnet ...] [--write]

Three situations take turns in every round:

    quiet    the runtime's process runs alone, with as many threads as there are cores
    loaded   beside it another process multiplies matrices with as many threads
    two      two processes of the same runtime run at once, each with as many threads

A row has the median and the 95th percentile of a run when quiet and when loaded, the ratios of the loaded times to the
quiet median, the median with two processes, and their total throughput as a share of that of one process. With --write
the rows go to bench/results/<device>/shared_cores.json. Takes about a minute for each runtime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import RUNTIMES, Case, able
from focalnet.benchmark.turns import Runtime

RUNTIMES_MEASURED = ("focalnet", "transformers", "onnxruntime", "openvino")
TURN_S = 2.0  # much longer than a time slice of the scheduler
# Multiplies matrices on all threads until it is killed. Prints a line once it has started.
LOAD = """
import torch
a = torch.randn(1024, 1024)
torch.mm(a, a)
print("ready", flush=True)
while True:
    torch.mm(a, a)
"""

console = Console()


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    batch: Annotated[int, typer.Option(help="Images in one pass.")] = 1,
    runtime: Annotated[list[str] | None, typer.Option(help=f"Some of: {'; '.join(RUNTIMES)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each situation.")] = 5,
    keep: Annotated[bool, typer.Option("--write", help="Put the rows among the committed ones.")] = False,
) -> None:
    """Measure, print a table, and with --write keep the rows."""
    case, environment, rows = Case(variant, size, batch), facts("cpu"), []
    names = [name for name in runtime or RUNTIMES_MEASURED if name in able(case)]
    for name in names:
        found = measured(name, case, rounds)
        if isinstance(found, str):
            console.print(f"left out: {name}: {found}", style="yellow")
        else:
            rows.append(found | environment)
    console.print(table(rows))
    if keep:
        write(rows, "shared_cores", environment["device"])


def measured(name: str, case: Case, rounds: int) -> dict[str, Any] | str:
    """The row of one runtime, or the reason why it cannot run."""
    pair = Runtime(name, case), Runtime(name, case)
    if pair[0].absent is not None:
        return pair[0].absent
    quiet: list[float] = []
    loaded: list[float] = []
    two: list[float] = []
    with load() as beside:
        for _ in track(range(rounds), name, console=Console(stderr=True), transient=True):
            quiet += turn(pair[0])
            with beside():
                loaded += turn(pair[0])
            two += together(pair)
    for process in pair:
        process.end()
    return row(name, case, quiet, loaded, two)


def turn(runtime: Runtime) -> list[float]:
    """Run for about `TURN_S` seconds, and three times at least. Returns the seconds of each run but the first."""
    runtime.run()
    end, runs = time.perf_counter() + TURN_S, []
    while len(runs) < 2 or time.perf_counter() < end:
        runs.append(runtime.run())
    return runs


def together(pair: tuple[Runtime, Runtime]) -> list[float]:
    """Let both processes take a turn at the same time. Returns the seconds of all runs."""
    with ThreadPoolExecutor(2) as pool:
        return [seconds for runs in pool.map(turn, pair) for seconds in runs]


@contextlib.contextmanager
def load() -> Iterator[Any]:
    """Start the other process, suspended. Yields a function whose context lets the process run."""
    process = subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def beside() -> Iterator[None]:
        os.kill(process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(process.pid, signal.SIGSTOP)

    try:
        yield beside
    finally:
        process.kill()
        process.wait()


def row(name: str, case: Case, quiet: list[float], loaded: list[float], two: list[float]) -> dict[str, Any]:
    """The result row. Times are in seconds; ``two_share`` is the throughput of two processes over that of one."""
    alone = statistics.median(quiet)
    percentile = lambda runs: statistics.quantiles(runs, n=20, method="inclusive")[-1]  # noqa: E731
    return {
        "case": "shared cores",
        "variant": case.variant,
        "size": case.size,
        "batch": case.batch,
        "dtype": case.dtype,
        "runtime": name,
        "quiet_s": alone,
        "quiet_p95_s": percentile(quiet),
        "loaded_s": statistics.median(loaded),
        "loaded_p95_s": percentile(loaded),
        "loaded_ratio": statistics.median(loaded) / alone,
        "loaded_p95_ratio": percentile(loaded) / alone,
        "two_s": statistics.median(two),
        "two_share": 2 * alone / statistics.mean(two),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0] if rows else {"variant": "", "size": 0, "batch": 0}
    title = f"Shared cores, {first['variant']}, {first['size']}, batch {first['batch']}"
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("runtime", no_wrap=True)
    for name in ("quiet, ms", "loaded, ms", "over quiet", "95th percentile", "two processes, share of one"):
        made.add_column(name, justify="right")
    for found in rows:
        made.add_row(
            found["runtime"],
            f"{found['quiet_s'] * 1e3:.1f}",
            f"{found['loaded_s'] * 1e3:.1f}",
            f"{found['loaded_ratio']:.2f}",
            f"{found['loaded_p95_ratio']:.2f}",
            f"{found['two_share']:.2f}",
        )
    return made


if __name__ == "__main__":
    typer.run(main)

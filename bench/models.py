"""A FocalNet on this CPU: focalnet against every runtime that is installed, in one run.

    python bench/models.py --variant tiny_lrf --size 224 --batch 1 --batch 8

Each runtime has a process of its own, and all take turns, so that a machine that drifts drifts for all. The rows go to
bench/results/<device>/models.json, one for each case and runtime; the table shows medians, fastest and ratios.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from environment import ROOT, device, facts, fma_peak
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from runtimes import INFERENCE_ONLY, RUNTIMES, Case, theirs

console = Console()
NOISY = 1.25  # median over fastest, from which the machine is said to be too noisy to trust


class Runtime:
    """A worker process."""

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        command = [sys.executable, Path(__file__).with_name("worker.py"), name, case.variant, case.size, case.batch]
        arguments = [str(part) for part in command] + (["train"] if case.training else [])
        log = subprocess.DEVNULL if "FOCALNET_DEBUG" not in os.environ else None
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT / "bench"
        )
        answer = self._read()
        self.absent = None if answer[0] == "ready" else str(answer[1])

    def run(self) -> None:
        self._write("run")
        self.seconds.append(float(self._read()[1]))

    def end(self) -> None:
        if self.absent is None:
            self._write("end")
            self.peak_bytes = int(self._read()[1])
        self.process.wait()

    def _write(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def _read(self) -> list:
        line = self.process.stdout.readline()
        return json.loads(line) if line else ["absent", "failed to start; FOCALNET_DEBUG=1 shows what it says"]


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = ["tiny_lrf"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="Image sizes.")] = [224],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    runtime: Annotated[list[str] | None, typer.Option(help="Which of the runtimes; all that are installed.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each runtime.")] = 15,
    train: Annotated[bool, typer.Option(help="A training step instead of inference.")] = False,
) -> None:
    """Compare runtimes, print a table for each case, and write the rows."""
    environment = facts()
    peak = fma_peak(int(environment["threads"]))
    console.print(f"{environment['device']}, {environment['threads']} threads, FMA peak {peak / 1e9:.0f} GFLOP/s")
    names = [name for name in runtime or RUNTIMES if not (train and name in INFERENCE_ONLY)]
    rows = []
    for case in (Case(v, s, b, train) for v in variant for s in size for b in batch):
        measured = rows_of(case, names, rounds)
        flops = case.batch * flops_per_image(case) * (3 if train else 1)
        for row in measured:
            row |= {"flops": flops, "share_of_fma_peak": flops / row["median_s"] / peak, "fma_peak": peak}
            row |= environment
        show(case, measured)
        rows += measured
        write(rows, "training" if train else "models")


def rows_of(case: Case, names: list[str], rounds: int) -> list[dict]:
    runtimes = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{case.variant} {case.size} x{case.batch}", total=len(names) * (rounds + 1))
        for name in names:
            runtimes.append(Runtime(name, case))
            progress.advance(task)
        present = [runtime for runtime in runtimes if runtime.absent is None]
        for _ in range(rounds):
            for runtime in present:
                runtime.run()
                progress.advance(task)
    for runtime in runtimes:
        runtime.end()
        if runtime.absent is not None:
            console.print(f"left out: {runtime.name}: {runtime.absent}", style="yellow")
    return [row(case, runtime) for runtime in present]


def row(case: Case, runtime: Runtime) -> dict:
    low, _, high = statistics.quantiles(runtime.seconds, n=4)
    return {
        "case": "training step" if case.training else "inference",
        "variant": case.variant,
        "size": case.size,
        "batch": case.batch,
        "dtype": "float32",
        "runtime": runtime.name,
        "median_s": statistics.median(runtime.seconds),
        "quartiles_s": [low, high],
        "fastest_s": min(runtime.seconds),
        "runs": len(runtime.seconds),
        "peak_memory_bytes": runtime.peak_bytes,
    }


def flops_per_image(case: Case) -> int:
    """Of convolutions and matrix products, counted on transformers' model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = theirs(Case(case.variant, case.size, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, case.size, case.size))
    return counter.get_total_flops()


def show(case: Case, rows: list[dict]) -> None:
    ours = next((row for row in rows if row["runtime"] == "focalnet"), rows[0])
    kind = rows[0]["case"]
    table = Table(title=f"{case.variant}, {case.size} x {case.size}, batch {case.batch}, float32, {kind}")
    table.add_column("runtime", no_wrap=True)
    for name in ("median ms", "fastest", "ratio", "of FMA peak", "memory MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["runtime"],
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['fastest_s'] * 1e3:.1f}",
            f"{row['median_s'] / ours['median_s']:.2f}",
            f"{row['share_of_fma_peak']:.0%}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    noisy = [row["runtime"] for row in rows if row["median_s"] > NOISY * row["fastest_s"]]
    if noisy:
        console.print(f"noisy machine: the median of {', '.join(noisy)} is far from the fastest run", style="yellow")


def write(rows: list[dict], name: str) -> None:
    folder = ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

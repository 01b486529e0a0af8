"""Runtimes taking turns, each in a process of its own: a machine that drifts drifts for all.

In one process the runtimes' thread pools would slow each other down.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from .runtimes import Case

NOISY = 1.25  # median over fastest, from which the machine is said to be too noisy to trust


class Runtime:
    """A worker process that has loaded one runtime. ``absent`` says why there is none, or is None."""

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        log = subprocess.DEVNULL if "FOCALNET_DEBUG" not in os.environ else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "focalnet.benchmark.worker", name, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
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


def compare(
    case: Case, names: list[str], rounds: int, on_step: Callable[[], object] = lambda: None
) -> tuple[list[dict], dict[str, str]]:
    """The rows of the runtimes that are there, and why each of the others is not.

    ``on_step`` is called ``len(names) * (rounds + 1)`` times at most: for each process started and each run.
    """
    runtimes = []
    for name in names:
        runtimes.append(Runtime(name, case))
        on_step()
    present = [runtime for runtime in runtimes if runtime.absent is None]
    for _ in range(rounds):
        for runtime in present:
            runtime.run()
            on_step()
    for runtime in runtimes:
        runtime.end()
    absent = {runtime.name: runtime.absent for runtime in runtimes if runtime.absent is not None}
    return [_row(case, runtime) for runtime in present], absent


def _row(case: Case, runtime: Runtime) -> dict:
    low, median, high = statistics.quantiles(runtime.seconds, n=4, method="inclusive")
    return {
        "case": "training step" if case.training else "inference",
        "variant": case.variant,
        "size": case.size,
        "batch": case.batch,
        "dtype": case.dtype,
        "runtime": runtime.name,
        "median_s": median,
        "quartiles_s": [low, high],
        "fastest_s": min(runtime.seconds),
        "runs": len(runtime.seconds),
        "peak_memory_bytes": runtime.peak_bytes,
    }


def noisy(rows: list[dict]) -> list[str]:
    """The runtimes whose median is so far from their fastest run that the machine was busy with something else."""
    return [row["runtime"] for row in rows if row["median_s"] > NOISY * row["fastest_s"]]

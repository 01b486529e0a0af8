"""Times runtimes in turns, each in its own process, so that a drift of the machine's speed affects all of them.

In one process the runtimes' thread pools would slow each other down. Times are compared within a round, where they are
seconds apart: a ratio is the median of theirs / ours over the rounds. Each round has its own random order, so that no
runtime always follows the same one. Rounds are added until the standard error of every ratio is at most `STEADY`, but
no more than the share `MORE`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .runtimes import Case
from .timing import ratio

OURS = "focalnet"
# Uncounted rounds after all processes have started.
WARM_UP_ROUNDS = 1
# A turn has as many runs as fit into TURN_S seconds, at least one and at most MAX_RUNS. Its time is their median.
TURN_S = 0.25
MAX_RUNS = 16
# No more rounds are needed if the relative standard error of every ratio is at most STEADY. At most the share MORE of
# the requested rounds is added.
STEADY = 0.02
MORE = 0.5
# A warning says that the machine was busy if the median time is more than NOISY times the fastest.
NOISY = 1.25


class Runtime:
    """A worker process that loads one runtime."""

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        self.runs: list[float] = []
        self.turns: list[float] = []
        self.peak_bytes: int | None = None
        self.model_bytes: int | None = None
        self._runs_a_turn = 1
        log = subprocess.DEVNULL if "FOCALNET_DEBUG" not in os.environ else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "focalnet.benchmark.worker", name, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    @functools.cached_property
    def absent(self) -> str | None:
        """Why the runtime could not be loaded, or None. Waits until it was."""
        what, value = self._read()
        return None if what == "ready" else str(value)

    def warm_up(self) -> None:
        """Make a run that is not counted, and compute how many runs fit into a turn."""
        self._runs_a_turn = min(MAX_RUNS, max(1, round(TURN_S / self.run())))

    def turn(self) -> None:
        """Take a turn of about `TURN_S` seconds."""
        runs = [self.run() for _ in range(self._runs_a_turn)]
        self.runs += runs
        self.turns.append(statistics.median(runs))

    def end(self) -> None:
        if self.absent is None:
            self._write("end")
            self.peak_bytes, self.model_bytes = self._read()[1]
        self.process.wait()

    def run(self) -> float:
        """Seconds of one run."""
        if self.absent is not None:
            raise RuntimeError(f"{self.name}: {self.absent}")
        self._write("run")
        what, value = self._read()
        if what != "seconds":
            raise RuntimeError(f"{self.name}: {value}")
        return float(value)

    def _write(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def _read(self) -> list[Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else ["absent", "its process ended; FOCALNET_DEBUG=1 shows what it says"]


def compare(
    case: Case, names: list[str], rounds: int, on_step: Callable[[], object] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of the runtimes that could run, and for each other runtime the reason why not.

    ``rounds`` is at least 2. ``on_step`` is called ``steps(names, rounds)`` times.
    """
    # All load their libraries side by side: on a machine with many cores that takes as long as the slowest.
    runtimes = [Runtime(name, case) for name in names]
    present = []
    for runtime in runtimes:
        if runtime.absent is None:
            present.append(runtime)
        on_step()
    _take_turns(present, rounds, on_step)
    for runtime in runtimes:
        runtime.end()
        if runtime.absent is not None:
            for _ in range(WARM_UP_ROUNDS + rounds):
                on_step()
    absent = {runtime.name: runtime.absent for runtime in runtimes if runtime.absent is not None}
    return [_row(case, runtime, _base(present)) for runtime in present], absent


def steps(names: list[str], rounds: int) -> int:
    """Total of a progress bar: process starts and turns, without the turns of added rounds."""
    return len(names) * (1 + WARM_UP_ROUNDS + rounds)


def _take_turns(runtimes: list[Runtime], rounds: int, on_step: Callable[[], object]) -> None:
    for _ in range(WARM_UP_ROUNDS):
        for runtime in runtimes:
            runtime.warm_up()
            on_step()
    for number in range(rounds + math.floor(MORE * rounds)):
        if number >= rounds and _steady(runtimes):
            return
        for runtime in order(runtimes, number):
            runtime.turn()
            if number < rounds:
                on_step()


def order(runtimes: list[Any], number: int) -> list[Any]:
    """A random order for round ``number``, the same in every run. A rotation would keep each runtime's predecessor."""
    return random.Random(number).sample(runtimes, len(runtimes))


def _steady(runtimes: list[Runtime]) -> bool:
    return all(ratio(runtime.turns, _base(runtimes).turns)["ratio_error"] <= STEADY for runtime in runtimes)


def _base(runtimes: list[Runtime]) -> Runtime:
    """The runtime that the others are compared with: ours, or the first if ours is missing."""
    return next((runtime for runtime in runtimes if runtime.name == OURS), runtimes[0])


def _row(case: Case, runtime: Runtime, base: Runtime) -> dict[str, Any]:
    low, median, high = statistics.quantiles(runtime.turns, n=4, method="inclusive")
    return {
        "case": "training step" if case.training else "inference",
        "variant": case.variant,
        "size": case.size,
        "batch": case.batch,
        "dtype": case.dtype,
        "runtime": runtime.name,
        "median_s": median,
        "quartiles_s": [low, high],
        "fastest_s": min(runtime.runs),
        "rounds": len(runtime.turns),
        "runs": len(runtime.runs),
        "ratio_to": base.name,
        **ratio(runtime.turns, base.turns),
        "peak_memory_bytes": runtime.peak_bytes,
        "model_memory_bytes": runtime.model_bytes,
    }


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Warnings about results that are unreliable because the machine was busy with other work."""
    unsteady = [
        f"{row['runtime']} {row['ratio']:.2f} (standard error {row['ratio_error']:.0%})"
        for row in rows
        if row["ratio_error"] > STEADY
    ]
    busy = [row["runtime"] for row in rows if row["median_s"] > NOISY * row["fastest_s"]]
    lines = []
    if unsteady:
        lines.append(f"noisy machine: these ratios may differ next time: {', '.join(unsteady)}")
    if busy:
        lines.append(f"noisy machine: the median time is far from the fastest run: {', '.join(busy)}")
    return lines

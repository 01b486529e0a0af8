"""Counters of the kernels of the levels, by Nsight Compute: what binds them on the device.

    python bench/gpu/gpu_ncu.py

Instructions, the share of cycles that issue, hits of L1 and L2, bytes of memory, and the reasons why warps wait. Rows
in bench/results/<device>/kernels.json. Without ncu, or where the driver keeps the counters to administrators, it says
so and is no failure.
"""

from __future__ import annotations

import csv
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import typer
from gpu_launches import short

from focalnet.benchmark.environment import facts
from focalnet.benchmark.operators import able_backends
from focalnet.benchmark.rows import write

SCRIPT = Path(__file__).with_name("gpu_launches.py")
STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "math_pipe_throttle",
    "lg_throttle",
    "mio_throttle",
    "wait",
)
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__t_sector_hit_rate.pct",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes.sum",
    *(f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS),
)
# Not the products and sums around them.
LEVELS = "regex:gated_aggregation|toeplitz"
# (operator, stage), the ones that matter most first.
CALLS = tuple(itertools.product(("gated_aggregation", "gated_aggregation_bwd"), (1, 3)))
LIMIT_S = 30.0


def command(ncu: str, operator: str, stage: int, backend: str) -> list[str]:
    watch = [ncu, "--csv", "--metrics", ",".join(METRICS), "--kernel-name", LEVELS, "--launch-count", "4"]
    call = ["--once", "--operator", operator, "--stage", str(stage), "--backend", backend]
    return [*watch, sys.executable, str(SCRIPT), *call]


def parsed(text: str) -> dict[str, dict[str, float]]:
    """{kernel: {metric: value}} of what ncu prints, of the last launch of each kernel."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[first:]):
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (ValueError, AttributeError):  # "n/a", and lines of the program after the table
            continue
        found.setdefault(short(row["Kernel Name"]), {})[row["Metric Name"]] = value
    return found


def main() -> None:
    """Count, print a line for each kernel, and write the rows."""
    environment = facts("cuda")
    torch.cuda.current_device()
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not installed: no counters")
        return
    for (operator, stage), backend in itertools.product(CALLS, able_backends("cuda")[:-1]):
        try:
            ended = subprocess.run(
                command(ncu, operator, stage, backend), capture_output=True, text=True, check=False, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            print(f"{operator}, stage {stage}, {backend}: not counted in {LIMIT_S:.0f} s", flush=True)
            continue
        if "ERR_NVGPUCTRPERM" in ended.stdout + ended.stderr:
            print("the driver keeps the counters to administrators: no counters")
            return
        rows = [
            {"case": "counters", "operator": operator, "variant": "tiny_lrf", "stage": stage, "batch": 128}
            | {"dtype": "bfloat16", "backend": backend, "subject": kernel, "metrics": metrics, **environment}
            for kernel, metrics in parsed(ended.stdout).items()
        ]
        for row in rows:
            print(f"{operator}, stage {stage}, {backend}: {row['subject']}: {row['metrics']}", flush=True)
        if not rows:
            print(f"{operator}, stage {stage}, {backend}: ncu counted nothing: {(ended.stdout + ended.stderr)[-300:]}")
        write(rows, "kernels", str(environment["device"]))


if __name__ == "__main__":
    typer.run(main)

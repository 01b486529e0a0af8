"""Counters of the kernels of the levels, by Nsight Compute: what binds them on the device.

    python bench/gpu/gpu_ncu.py

Instructions, the share of cycles that issue, hits of L1 and L2, bytes of memory, and the reasons why warps wait. Rows
in bench/results/<device>/kernels.json. Without ncu, or where the driver keeps the counters to administrators, it says
so and is no failure.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import typer
from gpu_launches import MARKER, ONCE, short

from focalnet.benchmark.environment import facts
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
# Not the products and sums around them; MARKER tells the calls apart.
KERNELS = f"regex:gated_aggregation|toeplitz|{MARKER}"
OPERATORS, STAGES = ("gated_aggregation", "gated_aggregation_bwd"), (1, 3)
MOST_LAUNCHES = 60
LIMIT_S = 60.0


def command(ncu: str) -> list[str]:
    """All calls in one process: each start of Python and torch costs seconds."""
    watch = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    watch += ["--kernel-name", KERNELS, "--launch-count", str(MOST_LAUNCHES)]
    calls = [word for name in OPERATORS for word in ("--operator", name)]
    calls += [word for stage in STAGES for word in ("--stage", str(stage))]
    return [*watch, sys.executable, str(SCRIPT), "--once", *calls]


def parsed(text: str) -> dict[str, dict[str, dict[str, float]]]:
    """{call: {kernel: {metric: value}}} of what ncu and the script print, of the last launch of each kernel."""
    lines = text.splitlines()
    calls = [line.removeprefix(ONCE) for line in lines if line.startswith(ONCE)]
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, dict[str, float]]] = {call: {} for call in calls}
    markers: set[str] = set()
    for row in csv.DictReader(lines[first:]):
        if not row.get("Kernel Name") or not row.get("Metric Value"):
            continue  # lines of the program after the table
        if (kernel := short(row["Kernel Name"])) == MARKER:
            markers.add(row["ID"])
            continue
        with contextlib.suppress(ValueError):  # "n/a"
            value = float(row["Metric Value"].replace(",", ""))
            found[calls[len(markers) - 1]].setdefault(kernel, {})[row["Metric Name"]] = value
    return found


def main() -> None:
    """Count, print a line for each kernel, and write the rows."""
    environment = facts("cuda")
    torch.cuda.current_device()
    ncu, start = shutil.which("ncu"), time.monotonic()
    if ncu is None:
        print("ncu is not installed: no counters")
        return
    try:
        ended = subprocess.run(command(ncu), capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"not counted in {LIMIT_S:.0f} s", flush=True)
        return
    if "ERR_NVGPUCTRPERM" in ended.stdout + ended.stderr:
        print("the driver keeps the counters to administrators: no counters")
        return
    found = parsed(ended.stdout)
    rows = [row_of(call, kernel, metrics) | environment for call in found for kernel, metrics in found[call].items()]
    for row in rows:
        print(f"{row['operator']}, stage {row['stage']}, {row['backend']}: {row['subject']}: {row['metrics']}")
    if not rows:
        print(f"ncu counted nothing: {(ended.stdout + ended.stderr)[-600:]}")
    print(f"{len(rows)} kernels: {time.monotonic() - start:.1f} s", flush=True)
    write(rows, "kernels", str(environment["device"]))


def row_of(call: str, kernel: str, metrics: dict[str, float]) -> dict[str, object]:
    operator, stage, backend = call.split(", ")
    head = {"case": "counters", "operator": operator, "variant": "tiny_lrf", "stage": int(stage.split()[-1])}
    head |= {"batch": 128, "dtype": "bfloat16", "backend": backend}
    return head | {"subject": kernel, "metrics": metrics}


if __name__ == "__main__":
    typer.run(main)

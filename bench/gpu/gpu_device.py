"""The device itself: its clocks, and the bandwidth of a copy, which no kernel exceeds.

    python bench/gpu/gpu_device.py [--device cpu]

A row in bench/results/<device>/kernels.json.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Annotated

import torch
import typer

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.timing import measure

COPY_BYTES = 1 << 30
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def main(device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda") -> None:
    """Measure and write the row."""
    environment = facts(device)
    size = COPY_BYTES if device == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda number: target.copy_(source)}, device, rounds=7)["copy"]
    row = {"case": "device", "subject": "copy", **timing.row(), **clocks(), **environment}
    row["bytes_per_s"] = 2 * size / float(row["median_s"])
    print(f"copy: {row['bytes_per_s'] / 1e9:.0f} GB/s")
    for name in (*CLOCKS, "torch", "triton", "driver", "cuda"):
        print(f"{name}: {row.get(name)}")
    if device == "cuda":
        write([row], "kernels", str(environment["device"]))


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU, while it is busy or right after; {} without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"]
    found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return dict(zip(CLOCKS, map(str.strip, found.stdout.strip().split(",")), strict=False))


if __name__ == "__main__":
    typer.run(main)

"""What the GPU kernels should reach by the performance model, beside what the committed rows predict.

    python bench/static/bars.py

Rows come from predicted.csv (Triton) and predicted_cuda.csv (CUDA) in bench/results/without-gpu, for an H100 in
bfloat16. The CUDA backend leaves the products of focal_modulation to PyTorch; torch_launches.py adds them. A bar is
met if one of the two backends meets it, since a call goes to the faster one; the bar on programs is for every kernel
of both. No figure is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch_launches
from backend_order import committed
from processors import H100
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.floors import stages

BATCH = 128
# By stage: (bar, moonshot), microseconds and launches.
FORWARD_US = {1: (150, 90), 2: (75, 45), 3: (40, 22), 4: (25, 14)}
BACKWARD_US = {1: (1200, 600), 2: (600, 300), 3: (350, 180), 4: (250, 120)}
LAUNCHES = {"focal_modulation": (4, 2), "focal_modulation_bwd": (12, 6)}
MIN_PROGRAMS = 264
LARGE_BACKWARD_US = (4000, 2000)  # large_fl3, stage 1, 32 images
Call = tuple[str, int, int, str]  # variant, stage, batch, operator


@dataclass(frozen=True)
class Bar:
    """``predicted`` by backend; one without rows of the call is left out. ``most``: the bar is an upper limit."""

    name: str
    bar: float
    moonshot: float | None
    predicted: dict[str, float]
    most: bool = True

    @property
    def met(self) -> bool:
        if not self.predicted:
            return False
        values = self.predicted.values()
        return min(values) <= self.bar if self.most else min(values) >= self.bar


def bars(rows: list[dict]) -> Iterator[Bar]:
    """Every bar, with the predictions of ``rows``."""
    mine = [row for row in rows if (row["x"], row["dtype"]) == (H100.name, "bfloat16")]
    whole = {(_call(row), _backend(row)): row for row in mine if row["subject"] == "all"}
    for stage, limits in FORWARD_US.items():
        call = ("tiny_lrf", stage, BATCH, "gated_aggregation")
        yield Bar(f"aggregation forward, stage {stage}, us", *limits, _of(whole, call, "predicted_us"))
    for stage, limits in BACKWARD_US.items():
        call = ("tiny_lrf", stage, BATCH, "focal_modulation_bwd")
        yield Bar(f"focal_modulation backward, stage {stage}, us", *limits, _of(whole, call, "predicted_us"))
    for operator, limits in LAUNCHES.items():
        for stage in FORWARD_US:
            found = _of(whole, ("tiny_lrf", stage, BATCH, operator), "launches")
            yield Bar(f"{operator}, stage {stage}, launches", *limits, found)
    call = ("large_fl3", 1, 32, "focal_modulation_bwd")
    name = "large_fl3 stage 1, 32 images: focal_modulation backward, us"
    yield Bar(name, *LARGE_BACKWARD_US, _of(whole, call, "predicted_us"))
    yield from _programs(mine)


def _programs(rows: list[dict]) -> Iterator[Bar]:
    """One bar for each kernel of the tiny model, with its fewest programs."""
    fewest: dict[tuple[str, str], int] = {}
    for row in rows:
        if (row["variant"], row["batch"]) == ("tiny_lrf", BATCH) and row["subject"] != "all":
            kernel = row["subject"].split()[-1] if _backend(row) == "triton" else row["subject"].split(" ", 1)[1]
            key = _backend(row), kernel.split("<")[0]
            fewest[key] = min(row["programs"], fewest.get(key, row["programs"]))
    for (backend, kernel), programs in sorted(fewest.items()):
        yield Bar(f"{kernel} of {backend}, fewest programs", MIN_PROGRAMS, None, {backend: programs}, most=False)


def _of(whole: dict[tuple[Call, str], dict], call: Call, field: str) -> dict[str, float]:
    """A figure of a call by backend."""
    found = {backend: whole[call, backend][field] for backend in ("triton", "cuda") if (call, backend) in whole}
    variant, number, batch, operator = call
    aggregation = (variant, number, batch, operator.replace("focal_modulation", "gated_aggregation"))
    if "cuda" not in found and (aggregation, "cuda") in whole:
        stage = stages(variant)[number - 1]
        around = torch_launches.around_aggregation(operator, stage)
        more = {
            "launches": len(around),
            "predicted_us": 1e6 * torch_launches.seconds(around, stage, batch, torch.bfloat16, H100),
        }
        found["cuda"] = round(whole[aggregation, "cuda"][field] + more[field], 2)
    return found


def _call(row: dict) -> Call:
    return row["variant"], row["stage"], row["batch"], row["operator"]


def _backend(row: dict) -> str:
    return row.get("backend") or "triton"


def main() -> None:
    table = Table("", "bar", "moonshot", "triton", "cuda", "met", title="predicted, not measured: H100, bfloat16")
    for bar in bars(committed()):
        cells = (f"{bar.predicted[name]:.0f}" if name in bar.predicted else "" for name in ("triton", "cuda"))
        moonshot = "" if bar.moonshot is None else str(bar.moonshot)
        table.add_row(bar.name, str(bar.bar), moonshot, *cells, "yes" if bar.met else "no")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

"""How the cost of a FocalNet grows: with the image, the batch, the levels and the kernels.

    python bench/scaling.py [--device cuda --dtype bfloat16]

The model at 224 to 1024 pixels and at batch 1 to 64; the operator with 1 to 4 levels, and with one kernel of 3 to 15.
For each, the exponent p of time ~ x ** p, fitted over the larger half of the points, where fixed costs weigh least.
Focal modulation is linear in the pixels: 2 for the side of the image, 1 for the batch; an attention over all pixels
tends to 4 in the side. The rows go to bench/results/<device>/scaling.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rows import write

from focalnet.benchmark.environment import device as device_name
from focalnet.benchmark.environment import facts
from focalnet.benchmark.runtimes import Case, ours
from focalnet.benchmark.timing import measure

SIZES = (224, 288, 384, 512, 640, 800, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LEVELS = (1, 2, 3, 4)
KERNELS = (3, 5, 7, 9, 11, 13, 15)
OPERATOR_SHAPE = (8, 28, 28, 192)  # the second stage of the tiny models at 224

console = Console()


@dataclass(frozen=True)
class Series:
    """Calls that differ in one number."""

    name: str
    subject: str
    values: tuple[int, ...]
    make: Callable[[int], Callable[[int], object]]


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Runs of each point.")] = 5,
) -> None:
    """Measure each series, print a table with the fitted exponents, and write the rows."""
    every = series(variant, torch.device(device), getattr(torch, dtype))
    environment = facts(device)
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for one in every:
            task = progress.add_task(one.name, total=len(one.values) * rounds)
            calls = {str(value): one.make(value) for value in one.values}
            # The points take turns: a machine that drifts does not bend the curve.
            timings = measure(calls, device, rounds, lambda task=task: progress.advance(task))
            for value in one.values:
                case = {"case": "scaling", "subject": one.subject, "series": one.name, "x": value, "dtype": dtype}
                rows.append({**case, **timings[str(value)].row(), **environment})
    for one in every:
        show([row for row in rows if row["series"] == one.name])
    write(rows, "scaling", device_name(device))


def series(variant: str, device: torch.device, dtype: torch.dtype) -> list[Series]:
    model = ours(Case(variant, 224, 1)).to(device, dtype)

    def images(batch: int, size: int) -> Callable[[int], object]:
        pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        return torch.inference_mode()(lambda number: model(pixels))

    def modulation(kernels: list[int]) -> Callable[[int], object]:
        return _modulation(kernels, device, dtype)

    return [
        Series("image side", variant, SIZES, lambda size: images(1, size)),
        Series("batch", variant, BATCHES, lambda batch: images(batch, 224)),
        Series("levels", "focal_modulation", LEVELS, lambda levels: modulation([3 + 2 * k for k in range(levels)])),
        Series("kernel", "focal_modulation", KERNELS, lambda size: modulation([size])),
    ]


def _modulation(kernels: list[int], device: torch.device, dtype: torch.dtype) -> Callable[[int], object]:
    import focalnet

    *positions, channels = OPERATOR_SHAPE
    tensor = {"device": device, "dtype": dtype}
    projected = torch.randn(*positions, 2 * channels + len(kernels) + 1, **tensor)
    q, ctx, gates = projected.split([channels, channels, len(kernels) + 1], dim=-1)
    focal_weights = [torch.randn(channels, 1, k, k, **tensor) / k for k in kernels]
    weight = torch.randn(channels, channels, **tensor) / math.sqrt(channels)
    return torch.inference_mode()(lambda number: focalnet.focal_modulation(q, ctx, gates, focal_weights, weight))


def exponent(points: list[tuple[float, float]]) -> float:
    """p of y ~ x ** p: the slope of a straight line through the logarithms."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


def fitted(rows: list[dict]) -> float:
    """The exponent of a series over the larger half of its points."""
    points = [(row["x"], row["median_s"]) for row in rows]
    return exponent(points[-max(2, math.ceil(len(points) / 2)) :])


def show(rows: list[dict]) -> None:
    first = rows[0]
    console.print(f"\n{first['subject']}, {first['dtype']}: time ~ {first['series']} ^ {fitted(rows):.2f}")
    table = Table()
    for name in (first["series"], "median ms", "fastest", f"over {first['x']}"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row["median_s"] / first["median_s"]
        table.add_row(str(row["x"]), f"{row['median_s'] * 1e3:.2f}", f"{row['fastest_s'] * 1e3:.2f}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

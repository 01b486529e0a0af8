"""Measures how the cost of a FocalNet grows with the image, the batch, the levels and the kernel size.

    python bench/scaling.py [--device cuda --dtype bfloat16]        about 4 minutes on two cores

The models of focalnet and transformers run at 224 to 1024 pixels and at batch 1 to 64. Each runtime has a new process
at each point, so its peak memory is that of the point. The runtimes take turns. The operator runs with 1 to 4 levels,
and with a single kernel of size 3 to 15. The points of such a series take turns in one process.

For each series the exponent p of time ~ x ** p is fitted over the larger half of the points, where fixed costs matter
least. Focal modulation is linear in the number of pixels: p is 2 for the side of the image and 1 for the batch. With
attention over all pixels, p tends to 4 for the side.

The rows go to bench/results/<device>/scaling.json as soon as they are measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from models import compared, console
from rich.table import Table

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case
from focalnet.benchmark.timing import measure

SIZES = (224, 288, 384, 512, 640, 800, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LEVELS = (1, 2, 3, 4)
KERNELS = (3, 5, 7, 9, 11, 13, 15)
OPERATOR_SHAPE = (8, 28, 28, 192)  # second stage of the tiny models at 224 x 224, batch 8
OPERATOR_ROUNDS = 11


def main(
    variant: Annotated[str, typer.Option(help="Name of a published variant.")] = "tiny_lrf",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    runtime: Annotated[list[str], typer.Option(help="Runtimes to measure.")] = ["focalnet", "transformers"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="Image sizes, at batch 1.")] = list(SIZES),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes, at 224 pixels.")] = list(BATCHES),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each runtime at each point.")] = 3,
) -> None:
    """Measure each series, print a table with the fitted exponents, and write the rows."""
    environment = facts(device)
    every = []
    for rows in (
        *of_operators(device, dtype),
        *of_models(Case(variant, 224, 1, device=device, dtype=dtype), size, batch, runtime, rounds),
    ):
        rows = [row | environment for row in rows]
        write(rows, "scaling", environment["device"])
        every += rows
    for of_series in grouped(every):
        show(of_series)


# ---- the operator ---------------------------------------------------------------------------------------------------


def of_operators(device: str, dtype: str) -> Iterator[list[dict]]:
    """Yield the rows of each series of the operator."""
    chains = {
        "levels": {n: [3 + 2 * level for level in range(n)] for n in LEVELS},
        "kernel": {k: [k] for k in KERNELS},
    }
    for name, chain in chains.items():
        console.print(f"focal_modulation, {name}: {', '.join(map(str, chain))}")
        # The points take turns, so that a drift of the machine's speed does not bend the curve.
        timings = measure(
            {x: modulation(kernels, device, dtype) for x, kernels in chain.items()}, device, OPERATOR_ROUNDS
        )
        shared = {
            "case": "scaling",
            "series": name,
            "subject": "focal_modulation",
            "dtype": dtype,
            "runtime": "focalnet",
        }
        yield [shared | {"x": x, **timing.row()} for x, timing in timings.items()]


def modulation(kernels: list[int], device: str, dtype: str) -> Callable[[int], object]:
    import focalnet

    *positions, channels = OPERATOR_SHAPE
    tensor = {"device": device, "dtype": getattr(torch, dtype)}
    projected = torch.randn(*positions, 2 * channels + len(kernels) + 1, **tensor)
    q, ctx, gates = projected.split([channels, channels, len(kernels) + 1], dim=-1)
    focal_weights = [torch.randn(channels, 1, k, k, **tensor) / k for k in kernels]
    weight = torch.randn(channels, channels, **tensor) / math.sqrt(channels)
    return torch.inference_mode()(lambda number: focalnet.focal_modulation(q, ctx, gates, focal_weights, weight))


# ---- models ---------------------------------------------------------------------------------------------------------


def of_models(
    smallest: Case, sizes: list[int], batches: list[int], runtimes: list[str], rounds: int
) -> Iterator[list[dict]]:
    """Yield the rows of each point of both series. A point that the series share is measured once."""
    cases = dict.fromkeys([(size, smallest.batch) for size in sizes] + [(smallest.size, batch) for batch in batches])
    for size, batch in cases:
        console.print(f"{smallest.variant}, {size} x {size}, batch {batch}")
        case = Case(smallest.variant, size, batch, device=smallest.device, dtype=smallest.dtype)
        found = compared(case, runtimes, rounds)
        if batch == smallest.batch and size in sizes:
            yield [as_point(row, "image side", size) for row in found]
        if size == smallest.size and batch in batches:
            yield [as_point(row, "batch", batch) for row in found]


def as_point(row: dict, series: str, x: int) -> dict:
    return row | {"case": "scaling", "series": series, "subject": row["variant"], "x": x}


# ---- results --------------------------------------------------------------------------------------------------------


def grouped(rows: list[dict]) -> list[list[dict]]:
    """The rows grouped by series, subject, runtime and dtype. Each group is sorted by x."""
    names = dict.fromkeys(name_of(row) for row in rows)
    return [sorted((row for row in rows if name_of(row) == name), key=lambda row: row["x"]) for name in names]


def name_of(row: dict) -> tuple:
    return row["series"], row["subject"], row["runtime"], row["dtype"]


def exponent(points: list[tuple[float, float]]) -> float:
    """The exponent p of y ~ x ** p: the slope of a line fitted to the logarithms."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


def fitted(rows: list[dict]) -> float:
    """The exponent of a series over the larger half of its points."""
    points = [(row["x"], row["median_s"]) for row in rows]
    return exponent(points[-max(2, math.ceil(len(points) / 2)) :])


def show(rows: list[dict]) -> None:
    first = rows[0]
    growth = f"time ~ {first['series']} ^ {fitted(rows):.2f}" if len(rows) > 1 else "one point"
    console.print(f"\n{first['subject']}, {first['runtime']}, {first['dtype']}: {growth}")
    table = Table()
    for name in (first["series"], "median ms", "fastest", f"over {first['x']}", "memory MB"):
        table.add_column(name, justify="right")
    for row in rows:
        times = (f"{row['median_s'] * 1e3:.2f}", f"{row['fastest_s'] * 1e3:.2f}")
        memory = f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else ""
        table.add_row(str(row["x"]), *times, f"{row['median_s'] / first['median_s']:.2f}", memory)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

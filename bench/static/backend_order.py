"""Writes the order of the GPU backends, the table of focalnet/backends/gpu_order.py, from predicted rows.

    python bench/static/backend_order.py

Rows come from predicted.csv and predicted_cuda.csv in bench/results/without-gpu. They name their backend; without a
name it is triton. Where a variant's stage was predicted for both backends, the sums of each class decide: a class is a
GPU, a dtype, an operator, the side of the map and the batch. `cuda` leaves the products to PyTorch: where only its
aggregation was predicted, torch_launches.py adds those. A class that was not predicted for both backends is a dot, and
the default order holds.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import torch_launches
import typer
from processors import PROCESSORS

from focalnet.backends import gpu_order
from focalnet.backends.gpu_order import BACKENDS, LARGEST_BATCHES, LARGEST_SIDES
from focalnet.benchmark.floors import OPERATORS, stages
from focalnet.benchmark.rows import NOWHERE, read

FILES = ("predicted", "predicted_cuda")
MARKED = re.compile(r"(# -- written by bench/static/backend_order.py\n).*?(# -- end\n)", re.DOTALL)
Kind = tuple[str, str, str]  # GPU, dtype, operator


def committed() -> list[dict]:
    """The predicted rows of both backends."""
    return [row for file in FILES for row in read(file, NOWHERE)]


def microseconds(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """{backend: microseconds} of each call that was predicted: (GPU, dtype, operator, variant, stage, batch)."""
    found: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["subject"] == "all":
            found[call_of(row)][row.get("backend") or "triton"] = row["predicted_us"]
    for device, dtype, operator, variant, number, batch in list(found):
        aggregation = found.get((device, dtype, _aggregation(operator), variant, number, batch), {})
        mine = found[device, dtype, operator, variant, number, batch]
        if "cuda" in aggregation and "cuda" not in mine:
            stage = stages(variant)[number - 1]
            launches = torch_launches.around_aggregation(operator, stage)
            around = torch_launches.seconds(launches, stage, batch, getattr(torch, dtype), PROCESSORS[device])
            mine["cuda"] = aggregation["cuda"] + 1e6 * around
    return found


def call_of(row: dict) -> tuple:
    """As the keys of `microseconds`."""
    return tuple(row[name] for name in ("x", "dtype", "operator", "variant", "stage", "batch"))


def _aggregation(operator: str) -> str:
    return operator.replace("focal_modulation", "gated_aggregation")


def table(rows: list[dict]) -> dict[Kind, str]:
    """`gpu_order.FIRST` by these rows."""
    sums: dict[Kind, dict] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    for (device, dtype, operator, variant, number, batch), times in microseconds(rows).items():
        if len(times) > 1:
            stage = stages(variant)[number - 1]
            place = bisect.bisect_left(LARGEST_SIDES, max(stage.height, stage.width))
            for backend, time in times.items():
                sums[device, dtype, operator][place, bisect.bisect_left(LARGEST_BATCHES, batch)][backend] += time
    order = {name: place for place, name in enumerate([*PROCESSORS, "bfloat16", "float16", "float32", *OPERATORS])}
    kinds = sorted(sums, key=lambda kind: [order[name] for name in kind])
    return {kind: _grid(sums[kind]) for kind in kinds}


def _grid(sums: dict[tuple[int, int], dict[str, float]]) -> str:
    letters = {name: letter for letter, name in BACKENDS.items() if letter != "."}
    best = {place: letters[min(times, key=lambda name: times[name])] for place, times in sums.items()}
    batches = range(len(LARGEST_BATCHES) + 1)
    columns = range(len(LARGEST_SIDES) + 1)
    return " ".join("".join(best.get((side, batch), ".") for batch in batches) for side in columns)


def written(text: str, rows: dict[Kind, str]) -> str:
    """``text`` of gpu_order.py with these rows."""
    lines = "".join(f"    {kind!r}: {grid!r},\n".replace("'", '"') for kind, grid in rows.items())
    value = f"{{\n{lines}}}" if rows else "{}"
    return MARKED.sub(rf"\1FIRST: dict[tuple[str | None, str, str], str] = {value}\n\2", text)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the table is old.")] = False,
) -> None:
    """Write the table, or check it."""
    path = Path(gpu_order.__file__)
    text, rows = path.read_text(), table(committed())
    new = written(text, rows)
    if not check:
        path.write_text(new)
        print(f"{path}: {len(rows)} lines")
    elif new != text:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Times the operator on a CPU, stage by stage, with every backend that runs here, and compares it with its floor.

    python bench/operators.py [--variant base_lrf --batch 1]        under a minute; on a GPU: bench/gpu/gpu_kernels.py

The floor of a call is the larger of two times: its bytes over the bandwidth, and its multiply-adds over the FMA rate.
Both rates are measured in the same run. GELUs are not counted, so no kernel reaches the floor. The rows go to
bench/results/<device>/operators.json.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from focalnet.benchmark import operators, tables
from focalnet.benchmark.environment import facts
from focalnet.benchmark.floors import Work, stages, work
from focalnet.benchmark.peaks import Peaks
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case

PASSES = {"forward": ("focal_modulation",), "forward and backward": ("focal_modulation", "focal_modulation_bwd")}

console = Console()


def main(
    variant: Annotated[str, typer.Option(help="Name of a published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Measured blocks of calls for each backend.")] = 15,
) -> None:
    """Measure every stage and direction, print the table, and write the rows."""
    case = Case(variant, size, batch)
    peaks = Peaks()
    peaks.measure()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=operators.steps(case, rounds))
        rows = list(operators.compare(case, rounds, lambda: progress.advance(task)))
    environment = facts() | peaks.measure()
    rows = [row | {"size": size} | least(row, case, environment) | environment for row in rows]
    console.print(tables.of_operators(rows))
    write(rows, "operators", environment["device"])


def least(row: dict, case: Case, peak: dict) -> dict[str, float]:
    """The bytes and operations that a row's call needs at least, and the seconds they take at the peak rates."""
    dtype = getattr(torch, case.dtype)
    passes = [work(operator, stage_of(row, case), case.batch, dtype) for operator in PASSES[row["case"]]]
    total = Work(*(sum(getattr(one, name) for one in passes) for name in ("bytes", "fma", "erf", "matrix")))
    flops = 2 * (total.fma + total.matrix)
    floor = max(total.bytes / peak["bandwidth"], flops / peak["fma_peak"])
    return {"least_bytes": total.bytes, "fma": total.fma, "erf": total.erf, "matrix": total.matrix, "floor_s": floor}


def stage_of(row: dict, case: Case):
    (found,) = (
        stage
        for stage in stages(case.variant, (case.size, case.size))
        if f"{stage.height} x {stage.width} x {stage.channels}" == row["stage"]
    )
    return found


if __name__ == "__main__":
    typer.run(main)

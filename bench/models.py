"""A FocalNet on this machine: focalnet against every runtime that is installed, in one run.

    python bench/models.py --variant tiny_lrf --size 224 --batch 1 --batch 8
    python bench/models.py --standard        the cases of the README's table, on a CPU

Each runtime has a process of its own, and all take turns, so that a machine that drifts drifts for all. The rows go
to bench/results/<device>/models.json (training.json with --train), one for each case and runtime; the tables show
medians, fastest runs and ratios.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rows import write

from focalnet.benchmark import tables, turns
from focalnet.benchmark.environment import facts, fma_peak
from focalnet.benchmark.runtimes import Case, able, flops_per_image

console = Console()

# Variant, image size, batch, rounds: many where a run is short, so that medians of two measurements agree.
STANDARD = (
    ("tiny_lrf", 224, 1, 60),
    ("tiny_lrf", 224, 8, 20),
    ("tiny_lrf", 224, 32, 7),
    ("tiny_lrf", 384, 8, 9),
    ("tiny_lrf", 640, 1, 20),
    ("base_lrf", 224, 1, 30),
    ("base_lrf", 224, 8, 9),
    ("large_fl3", 384, 1, 9),
)
STANDARD_RUNTIMES = ["focalnet", "transformers", "transformers, compile", "onnxruntime", "openvino"]


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = ["tiny_lrf"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="Image sizes.")] = [224],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    runtime: Annotated[list[str] | None, typer.Option(help="Which of the runtimes; all that are installed.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each runtime.")] = 15,
    train: Annotated[bool, typer.Option(help="A training step instead of inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    standard: Annotated[bool, typer.Option("--standard", help="A fixed set of cases, not those named.")] = False,
) -> None:
    """Compare runtimes, print a table for each case, and write the rows."""
    environment = facts(device)
    if device == "cpu":
        environment["fma_peak"] = fma_peak(int(environment["threads"]))
        console.print(f"{environment['device']}, FMA peak {environment['fma_peak'] / 1e9:.0f} GFLOP/s")
    cases = [(Case(v, s, b, train, device, dtype), rounds) for v in variant for s in size for b in batch]
    if standard:
        cases = [(Case(v, s, b, train, device, dtype), n) for v, s, b, n in STANDARD]
        runtime = runtime or STANDARD_RUNTIMES
    for number, (case, turns_each) in enumerate(cases, 1):
        console.print(f"case {number} of {len(cases)}: {case.variant}, {case.size}, batch {case.batch}")
        rows = compared(case, [name for name in able(case) if not runtime or name in runtime], turns_each)
        if not rows:
            continue
        flops = case.batch * flops_per_image(case) * (3 if train else 1)
        for row in rows:
            row |= {"flops": flops, **environment}
            if device == "cpu":
                row["share_of_fma_peak"] = flops / row["median_s"] / environment["fma_peak"]
        console.print(tables.of_runtimes(case, rows))
        if noisy := turns.noisy(rows):
            console.print(f"noisy machine: the median of {', '.join(noisy)} is far from the fastest", style="yellow")
        write(rows, "training" if train else "models", environment["device"])


def compared(case: Case, names: list[str], rounds: int) -> list[dict]:
    """The rows of what is installed; what is not is said."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{case.variant} {case.size} x{case.batch}", total=len(names) * (rounds + 1))
        rows, absent = turns.compare(case, names, rounds, lambda: progress.advance(task))
    for name, reason in absent.items():
        console.print(f"left out: {name}: {reason}", style="yellow")
    return rows


if __name__ == "__main__":
    typer.run(main)

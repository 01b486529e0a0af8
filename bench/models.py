"""Times a FocalNet in focalnet and in every other installed runtime, in one run.

    python bench/models.py --variant tiny_lrf --size 224 --batch 1 --batch 8
    python bench/models.py --runtime focalnet --runtime "transformers, max-autotune"
    python bench/models.py --standard            the table of docs/performance.md, on a CPU: 12 to 15 minutes
    python bench/models.py --standard --dtype bfloat16
    python bench/models.py --standard --train    its table of training steps: 3 to 4 minutes
    python bench/models.py --standard --train --dtype bfloat16          the same under autocast

Each runtime has its own process, and the processes take turns (`focalnet.benchmark.turns`). Runtimes that take minutes
to start (max-autotune) are measured only if --runtime names them. The rows, one for each case and runtime, go to
bench/results/<device>/models.json (training.json with --train).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from compare import agree
from rich.console import Console
from rich.progress import Progress

from focalnet.benchmark import tables, turns
from focalnet.benchmark.environment import facts
from focalnet.benchmark.peaks import Peaks
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import RUNTIMES, Case, able, flops_per_image, unasked

console = Console()

TORCH = ["focalnet", "transformers"]
EVERYTHING = [*TORCH, "transformers, compile", "onnxruntime", "openvino", "openvino, default"]
PATCHED = [*EVERYTHING, "transformers, patched", "timm", "timm, patched"]
# Variant, image size, batch, rounds, runtimes. torch.compile and an ONNX export take up to a minute per case, so only
# some cases have them. Slow cases get few rounds.
STANDARD = (
    ("tiny_lrf", 224, 1, 40, PATCHED),
    ("tiny_lrf", 224, 8, 11, EVERYTHING),
    ("tiny_lrf", 224, 32, 5, TORCH),
    ("tiny_lrf", 384, 8, 5, TORCH),
    ("tiny_lrf", 640, 1, 11, EVERYTHING),
    ("base_lrf", 224, 1, 20, [*TORCH, "onnxruntime", "openvino"]),
    ("base_lrf", 224, 8, 5, TORCH),
    ("large_fl3", 384, 1, 5, TORCH),
)
# The runtimes for bfloat16. OpenVINO's default precision is bfloat16 where the processor supports it.
HALVES = [*TORCH, "transformers, compile", "openvino, default"]
STANDARD_BFLOAT16 = (
    ("tiny_lrf", 224, 1, 40, [*HALVES, "transformers, patched"]),
    ("tiny_lrf", 224, 8, 11, HALVES),
    ("tiny_lrf", 640, 1, 11, HALVES),
    ("base_lrf", 224, 1, 20, HALVES),
)
STANDARD_TRAINING = (("tiny_lrf", 224, 8, 20, [*TORCH, "transformers, patched"]),)


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = ["tiny_lrf"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="Image sizes.")] = [224],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    runtime: Annotated[
        list[str] | None, typer.Option(help=f"One or more of: {'; '.join(RUNTIMES)}. Default: all that are installed.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each runtime; use more on a noisy machine.")] = 11,
    train: Annotated[bool, typer.Option(help="Measure a training step instead of inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    standard: Annotated[bool, typer.Option("--standard", help="A fixed set of variants, sizes and batches.")] = False,
    compare_with: Annotated[
        Path | None, typer.Option(help="Rows of an earlier run: exit with 1 if a ratio differs by over 10 percent.")
    ] = None,
) -> None:
    """Compare runtimes, print a table for each case, and write the rows."""
    if unknown := set(runtime or ()) - set(RUNTIMES):
        raise typer.BadParameter(f"--runtime: expected some of {', '.join(map(repr, RUNTIMES))}, got {unknown}")
    before = json.loads(compare_with.read_text()) if compare_with else []
    cases = [(Case(v, s, b, train, device, dtype), rounds, runtime) for v in variant for s in size for b in batch]
    if standard:
        fixed = STANDARD_TRAINING if train else STANDARD_BFLOAT16 if dtype == "bfloat16" else STANDARD
        cases = [(Case(v, s, b, train, device, dtype), n, runtime or names) for v, s, b, n, names in fixed]
    kind = "training" if train else "models"
    found = measured(cases, device, kind if dtype == "float32" or device != "cpu" else f"{kind}-{dtype}")
    if compare_with and not agree(before, found):
        raise typer.Exit(1)


def measured(cases: list[tuple[Case, int, list[str] | None]], device: str, kind: str) -> list[dict]:
    """Measure all cases and return their rows. Each case is printed and written as soon as it is measured."""
    environment = facts(device)
    peaks = Peaks() if device == "cpu" else None
    every = []
    for number, (case, rounds, wanted) in enumerate(cases, 1):
        console.print(f"case {number} of {len(cases)}: {case.variant}, {case.size}, batch {case.batch}")
        # Measured before each case, and the best so far is used: noise only lowers a measured peak.
        best = peaks.measure(case.dtype) if peaks else {}
        names = [name for name in wanted if name in able(case)] if wanted else unasked(case)
        rows = compared(case, names, rounds)
        if not rows:
            continue
        flops = case.batch * flops_per_image(case) * (3 if case.training else 1)
        rows = [row | {"flops": flops, **best, **environment} for row in rows]
        console.print(tables.of_runtimes(case, rows))
        write(rows, kind, environment["device"])
        every += rows
    return every


def compared(case: Case, names: list[str], rounds: int) -> list[dict]:
    """The rows of the runtimes that could run. Prints which ones are left out, and warnings about a noisy machine."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{case.variant} {case.size} x{case.batch}", total=turns.steps(names, rounds))
        rows, absent = turns.compare(case, names, rounds, lambda: progress.advance(task))
    for name, reason in absent.items():
        console.print(f"left out: {name}: {reason}", style="yellow")
    for line in turns.warnings(rows):
        console.print(line, style="yellow")
    return rows


if __name__ == "__main__":
    typer.run(main)

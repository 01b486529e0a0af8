"""Times every launch plan that tuning tries, and both backends, at the sizes of each stage.

    python bench/gpu/gpu_sweep.py [--batch 128]

`focalnet tune` measures the same and keeps the fastest; here every time is a row of bench/results/<device>/sweep.json,
written call by call, with the fields of the plan.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from focalnet.benchmark import tuning
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case


def rows_of(found: tuning.Measured, case: Case) -> list[dict]:
    """A row for each backend and for each plan of Triton."""
    head = {"case": "sweep", "operator": found.operator, "variant": case.variant, "stage": found.stage.name}
    head |= {"size": case.size, "batch": case.batch, "dtype": case.dtype}
    rows = [head | {"backend": name, "seconds": seconds} for name, seconds in found.seconds.items()]
    for name, (plan, seconds) in found.plans.items():
        rows.append(head | {"backend": "triton", "subject": name, "plan": plan, "seconds": seconds})
    return rows + [head | {"subject": name, "failed": reason} for name, reason in found.failed.items()]


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size in pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Measured blocks of calls of each.")] = 3,
) -> None:
    """Measure, print a line for each plan, and write the rows."""
    torch.cuda.current_device()
    environment, case = facts("cuda"), Case(variant, size, batch, device="cuda", dtype=dtype)
    for found in tuning.tune(case, tuning.able(), tuning.timer("cuda", rounds)):
        rows = rows_of(found, case)
        for row in rows:
            what = row.get("subject") or row["backend"]
            time = row.get("failed") or f"{1e6 * row['seconds']:.1f} us"
            print(f"{row['operator']}, {row['stage']}: {what}: {time}", flush=True)
        write([row | environment for row in rows], "sweep", str(environment["device"]))


if __name__ == "__main__":
    typer.run(main)

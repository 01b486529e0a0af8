"""Measures the host's time for one call of focal_modulation: forward, no gradients, warm, without the kernels' time.

    TRITON_INTERPRET=1 python bench/gpu/host_time.py     without a GPU: everything except the launches
    python bench/gpu/host_time.py                        with a GPU: each call's kernels end before the next call

The public function is compared with the operator, which the function skips if nothing observes it, and with the
backend alone. A small torch operator shows the speed of the machine at that moment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import typer
from focalnet.kernels.plan import INTERPRETED, Plan
from rich.console import Console
from rich.table import Table

import focalnet
from focalnet.backends import triton as triton_backend
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.timing import measure
from focalnet.operators.norm_linear import padded_empty

SHAPE = (4, 14, 14, 384)  # batch 4 at stage 3 of tiny
KERNELS = (3, 5, 7)

console = Console()


def leave_launches_out() -> None:
    """A plan's first run compiles nothing and keeps, for each launch, a function that takes its arguments."""

    def launch(*arguments: object) -> None:
        pass

    Plan._launch_first = lambda plan, tensors: plan._keep([launch] * len(plan.launches))


def calls(device: str) -> dict[str, Callable[[int], object]]:
    """By what each is, on the same arguments: views of one projection, padded as a model pads it."""
    *image, channels = SHAPE
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    packed = padded_empty(like, (*image, 2 * channels + len(KERNELS) + 1)).normal_()
    q, ctx, gates = packed.split([channels, channels, len(KERNELS) + 1], -1)
    focal_weights = [torch.randn(channels, 1, k, k, dtype=torch.bfloat16, device=device) for k in KERNELS]
    weight = torch.randn(channels, channels, dtype=torch.bfloat16, device=device)
    bias = torch.randn(channels, dtype=torch.bfloat16, device=device)
    arguments = (q, ctx, gates, focal_weights, weight, bias)
    small = torch.randn(8, 8, device=device)
    operator = torch.ops.focalnet.focal_modulation
    return {
        "focal_modulation": lambda _: focalnet.focal_modulation(*arguments, backend="triton"),
        "as an operator": lambda _: operator(*arguments, False, "triton"),
        "backend alone": lambda _: triton_backend.focal_modulation(*arguments, False),
        "linear, 8 x 8": lambda _: F.linear(small, small),
    }


def main() -> None:
    """Measure, print a table, and write the rows."""
    device = "cpu" if INTERPRETED else "cuda"
    if INTERPRETED:
        leave_launches_out()
    with torch.no_grad():
        timings = measure(calls(device), "cpu", rounds=15)
    environment = facts(device) | {"launches": "left out" if INTERPRETED else "made"}
    rows = [
        {"case": "host time", "subject": name, "dtype": "bfloat16", **timing.row(), **environment}
        for name, timing in timings.items()
    ]
    table = Table(title=f"host time of a call, launches {environment['launches']}")
    table.add_column("call", no_wrap=True)
    for column in ("median, us", "fastest, us"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["subject"], f"{1e6 * row['median_s']:.1f}", f"{1e6 * row['fastest_s']:.1f}")
    console.print(table)
    write(rows, "host_time", environment["device"])


if __name__ == "__main__":
    typer.run(main)

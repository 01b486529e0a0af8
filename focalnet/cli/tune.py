"""``focalnet tune``: measures on this GPU which backend and which plan is the fastest, and keeps the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .compute import DType, InDType, torch_dtype
from .errors import UserError
from .output import Bar

if TYPE_CHECKING:
    from rich.table import Table

    from ..benchmark.tuning import Measured


def tune(
    variant: Annotated[str, typer.Option(help="A published variant, e.g. tiny_lrf.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(min=32, help="Image size in pixels.")] = 224,
    batch: Annotated[list[int], typer.Option("--batch-size", "-b", min=1, help="Images; repeat for several.")] = [1],  # noqa: B006
    dtype: InDType = DType.auto,
    plans: Annotated[
        bool, typer.Option("--plans/--no-plans", help="Time Triton's launch plans too; compiling them takes minutes.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of measurements; use more on a noisy machine.")] = 9,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file; default: in the cache folder.")] = None,
) -> None:
    """Measure the GPU backends on this GPU, for the calls that a model makes, and keep the fastest of each.

    The result is used where FOCALNET_TUNED=1 is set (or FOCALNET_TUNED=FILE), on this GPU with this driver and these
    versions of torch, triton and focalnet.
    """
    import torch

    from ..backends import tuned
    from ..benchmark import tuning
    from ..benchmark.operators import stages
    from ..benchmark.runtimes import Case
    from ..variants import VARIANTS

    if variant not in VARIANTS:
        raise UserError(f"--variant: expected one of {', '.join(VARIANTS)}, got {variant}")
    names = _backends()
    device = torch.device("cuda", torch.cuda.current_device())
    computing_in = str(torch_dtype(dtype, device)).removeprefix("torch.")
    cases = [Case(variant, size, images, device="cuda", dtype=computing_in) for images in batch]
    path, here = out or tuned.default_file(), tuned.facts(device)
    time = tuning.timer("cuda", rounds)
    measured = []
    with Bar("measuring", len(tuning.OPERATORS) * sum(len(stages(case)) for case in cases), wanted=True) as bar:
        for case in cases:
            for found in tuning.tune(case, names, time, plans):
                if found.seconds:
                    # Kept at once: what was measured stays if the rest is interrupted.
                    tuned.keep(path, here, {tuned.key(found.problem): found.choice})
                measured.append(found)
                bar.advance(1)
    _print(measured, here, path, is_default=out is None)


def _backends() -> list[str]:
    """The GPU backends to measure. Raises UserError if there is none."""
    import torch

    from ..backends.registry import backends
    from ..benchmark import tuning

    if not torch.cuda.is_available():
        raise UserError(
            "there is nothing to tune without a GPU: PyTorch finds no CUDA device here (see `focalnet info`)"
        )
    if not (names := tuning.able()):
        reasons = "; ".join(f"{name}: {backends()[name]}" for name in ("triton", "cuda"))
        raise UserError(f"no GPU backend can run here: {reasons}")
    return names


def _print(measured: list[Measured], here: dict[str, str | None], path: Path, is_default: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in here.items() if value), style="dim")
    console.print(_table(measured))
    for found in measured:
        for name, reason in found.failed.items():
            console.print(
                f"{found.operator}, {found.stage.name}: {name} failed: {reason}", style="yellow", markup=False
            )
    value = "1" if is_default else str(path)
    console.print(f"written: {path}\nto use it: FOCALNET_TUNED={value}", markup=False, soft_wrap=True)


def _table(measured: list[Measured]) -> Table:
    from rich.table import Table

    from ..backends.tuned import BACKENDS

    table = Table("operator", "batch", "stage", *(f"{name}, µs" for name in BACKENDS), "triton's plan", "first")
    for found in measured:
        if not found.seconds:
            continue
        choice = found.choice
        times = [f"{1e6 * choice.seconds[name]:.1f}" if name in choice.seconds else "" for name in BACKENDS]
        row = (found.operator, str(found.stage.batch), found.stage.name, *times, _plan(found), choice.backend)
        table.add_row(*row)
    return table


def _plan(found: Measured) -> str:
    """How Triton's fastest plan differs from that of the table."""
    plan = found.choice.plan
    if plan is None or not found.plans:
        return "of the table" if found.plans else ""
    usual: dict[str, Any] = next(iter(found.plans.values()))[0]
    return ", ".join(f"{name} {value}" for name, value in plan.items() if value != usual.get(name))

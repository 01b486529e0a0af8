"""``focalnet bench``: times the model and the operator on this machine against the runtimes installed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .compute import Device, DType, InDType, OnDevice, device_for, torch_dtype
from .errors import UserError
from .output import Bar, require_matplotlib

# The default runtimes, in the order of the table. `focalnet.benchmark.runtimes` has more.
DEFAULT = (
    "focalnet",
    "transformers",
    "transformers, compile",
    "timm",
    "timm, channels-last, compile",
    "onnxruntime",
    "openvino",
)


def bench(
    variant: Annotated[str, typer.Option(help="A published variant, e.g. tiny_lrf.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(min=32, help="Image size in pixels.")] = 224,
    batch: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in one pass.")] = 1,
    device: OnDevice = Device.auto,
    dtype: InDType = DType.float32,
    train: Annotated[bool, typer.Option("--train", help="Time a training step instead of inference.")] = False,
    runtimes: Annotated[
        list[str] | None, typer.Option("--runtime", metavar="NAME", help="A runtime to time; repeat for several.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of measurements; use more on a noisy machine.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the times: a .png, .svg or .pdf file.")
    ] = None,
) -> None:
    """Time a FocalNet on this machine against transformers, timm, ONNX Runtime and OpenVINO, and time each backend.

    Each runtime has its own process, and the runtimes take turns. Runtimes that are not installed are listed and left
    out.
    """
    from ..benchmark import environment, operators, turns
    from ..benchmark.runtimes import RUNTIMES, Case, able
    from ..variants import VARIANTS

    if plot is not None:
        _check_plot(plot)
    if variant not in VARIANTS:
        raise UserError(f"--variant: expected one of {', '.join(VARIANTS)}, got {variant}")
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise UserError(f"--runtime: expected one of {', '.join(map(repr, RUNTIMES))}, got {name!r}")
    where = device_for(device, None)
    computing_in = str(torch_dtype(dtype, where)).removeprefix("torch.")
    case = Case(variant, size, batch, train, where.type, computing_in)
    names = [name for name in runtimes or DEFAULT if name in able(case)]
    if not names:
        raise UserError(f"--runtime: {', '.join(runtimes or ())} cannot run {case.dtype} on {case.device} here")

    steps = turns.steps(names, rounds) + operators.steps(case, rounds)
    with Bar("measuring", steps, wanted=not as_json) as bar:
        models, absent = turns.compare(case, names, rounds, lambda: bar.advance(1))
        stages = list(operators.compare(case, rounds, lambda: bar.advance(1)))
    facts = environment.facts(case.device)
    if as_json:
        typer.echo(
            json.dumps({"environment": facts, "models": models, "operators": stages, "absent": absent}, indent=2)
        )
    else:
        _print(case, facts, models, stages, absent)
    if plot is not None:
        _draw(plot, case, facts, models, stages)


def _check_plot(plot: Path) -> None:
    """Raise UserError before anything is measured if no figure can be written to ``plot``."""
    from ..pictures.style import why_not_path

    require_matplotlib()
    if (reason := why_not_path(plot)) is not None:
        raise UserError(f"--plot: {reason}")
    if not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: expected a file in a folder that exists, got none called {plot.parent}")


def _draw(
    plot: Path, case: Any, facts: dict[str, Any], models: list[dict[str, Any]], stages: list[dict[str, Any]]
) -> None:
    from ..pictures import style
    from ..pictures.measurements import bench_figure

    what = "training step" if case.training else "inference"
    title = f"{case.variant}, {case.size} × {case.size}, batch {case.batch}, {case.dtype}, {what}"
    style.save(bench_figure(title, str(facts["device"]), models, stages), plot)


def _print(
    case: Any,
    facts: dict[str, Any],
    models: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    absent: dict[str, str],
) -> None:
    from rich.console import Console

    from ..benchmark import tables, turns

    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value), style="dim")
    if models:
        console.print(tables.of_runtimes(case, models))
    console.print(tables.of_operators(stages))
    for name, reason in absent.items():
        console.print(f"left out: {name}: {reason}", style="yellow")
    for line in turns.warnings(models):
        console.print(line, style="yellow")

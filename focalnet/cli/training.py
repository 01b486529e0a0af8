"""The parts that the training commands share: options, settings, and the display of a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pretrained import shipped
from ..training import processes
from .errors import SOME_SKIPPED, UserError, complain
from .models import parse_fields, silence_transformers, stay_offline_unless_reachable
from .output import Bar
from .sources import refuse_what_is_no_checkpoint

if TYPE_CHECKING:
    from ..training.events import Epoch, Events
    from ..training.models import Start
    from ..training.recipes import Recipe
    from ..training.runs import Run
    from ..training.settings import Settings
    from ..training.sources import ImageReader

NEEDED = ("accelerate", "datasets", "kornia", "matplotlib")
_DATA_PACKAGES = {"digits": ("sklearn", "scikit-learn"), "photographs": ("skimage", "scikit-image")}

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of images or of classes (with train/ and val/ in it, or without), parquet, a hub name, "
        "or digits or photographs, which need no download.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A directory, checkpoint file, hub id or variant; by default the recipe's."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write to.", show_default="runs/DATA")]
RecipeName = Annotated[str | None, typer.Option("--recipe", "-r", help="Name of a recipe, or a .yaml file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint in --output.")]
Epochs = Annotated[float | None, typer.Option(help="Number of passes over all images.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop early with a checkpoint; --resume continues.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", help="Images per pass and process.")]
Accumulate = Annotated[int | None, typer.Option(help="Passes per optimizer step.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate, after the warm-up.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the training images in pixels.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order, augmentation and dropout.")]
Workers = Annotated[int | None, typer.Option(help="Processes that prepare images.")]
Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16, keep weights in float32.")]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute blocks to save memory."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Any other setting, e.g. layer_decay=0.8 or mixup=0.8."),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A configuration field that the model does not determine."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse to train if an image cannot be read.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Decode every image once before training.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan (steps, learning rate, memory, hours) and stop.")
]
Images = Annotated[int | None, typer.Option(help="With --dry-run: number of training images; DATA need not exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document at the end instead of lines.")]


def prepare(data: str) -> None:
    """Prepare a training command: check the packages, silence libraries, go offline without network.

    UserError if a package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    module, package = _DATA_PACKAGES.get(data, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        missing.append(package)
    if missing:
        raise UserError(f"training needs {', '.join(missing)}: pip install 'focalnet[train]'")
    silence_transformers()
    # datasets' progress bars last milliseconds and would mix with the command's output.
    import datasets

    datasets.disable_progress_bars()
    if data in _DATA_PACKAGES or Path(data).expanduser().exists():
        return
    if not stay_offline_unless_reachable():
        from datasets import config

        config.HF_HUB_OFFLINE = True


def chosen_recipe(name: str | None, task: str, default: str) -> Recipe:
    """The recipe called ``name``, or ``default`` if no name is given.

    Raises:
        UserError: the recipe is for another task.
        ValueError: there is no such recipe, or it is invalid.
    """
    from ..training import load_recipe

    recipe = load_recipe(name or default)
    if recipe.task != task:
        raise UserError(f"--recipe {recipe.name}: this is one for focalnet {recipe.task}")
    return recipe


def settings_of(recipe: Recipe, options: list[str] | None, **given: Any) -> Settings:
    """The recipe's settings, overridden by those of the command line."""
    from ..training.settings import parse_setting

    try:
        named = dict(map(parse_setting, options or []))
    except ValueError as error:
        raise UserError(f"--option: {error}") from None
    try:
        return recipe.settings.but(**named).but(**given)
    except ValueError as error:
        raise UserError(f"setting {error}") from None


def start_of(model: str | None, recipe: Recipe, fields: list[str] | None, use_ema: bool | None = None) -> Start:
    """The source of the initial weights: --model, else the recipe's."""
    from ..training.models import Start
    from ..variants import VARIANTS

    given = parse_fields(fields)
    if model is None:
        return Start(recipe.model, config={**recipe.config, **given}, use_ema=use_ema)
    if model in VARIANTS:
        return Start(model, config=given)
    folder = shipped(model)
    if not Path(model).expanduser().exists() and folder is None:
        stay_offline_unless_reachable()
    try:
        refuse_what_is_no_checkpoint(model)
    except UserError as error:
        raise UserError(f"--model {model}: {error}") from None
    return Start(model, config=given, use_ema=use_ema)


def reader() -> ImageReader:
    """The image reader for training: the same file types, read in the same way, as in all other commands."""
    from ..training.sources import ImageReader
    from .images import EXTENSIONS, read_image, why_unreadable

    return ImageReader(read_image, EXTENSIONS, why_unreadable)


def show_run(train: Callable[[Run, Events], dict[str, Any]], run: Run, as_json: bool) -> None:
    """Train and show the progress in the first process. Exceptions of the run are not caught."""
    if processes.rank() > 0:
        from ..training.events import Events

        train(run, Events())
        return processes.leave()
    shown = Shown(quiet=as_json)
    events: Any = shown  # not a subclass of Events, because importing that is slow
    try:
        summary = train(run, events)
    finally:
        shown.close()
    processes.leave()
    finish(summary, as_json)


def show_plan(run: Run, task: str, images: int | None, source: str, as_json: bool) -> None:
    """Print the plan that `focalnet.training.plan` computes for a run."""
    from ..training.plan import plan

    expected = plan(run, task, images, source)
    if as_json:
        typer.echo(json.dumps(expected.as_dict(), indent=2))
        return
    for name, text in expected.lines():
        typer.echo(f"{name:16}{text}")
    typer.echo(expected.curve())


def finish(summary: dict[str, Any], as_json: bool) -> None:
    """Print the result and the output folder. Exit with code 1 if images were left out."""
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        ended = "stopped by --max-minutes, --resume goes on" if summary["stopped"] == "time" else "done"
        result = _result(summary)
        typer.echo(f"{ended}: {summary['epochs_done']:g} epochs in {summary['seconds']:.0f} s{result}")
        typer.echo(f"wrote {summary['output']}: model, README.md, curves.png, summary.json")
    if summary["skipped"]:
        raise typer.Exit(SOME_SKIPPED)


def _result(summary: dict[str, Any]) -> str:
    if "accuracy" in summary:
        return f", accuracy {summary['accuracy']:.2%} on {summary['held_out']} held-out images"
    if "mean_colour_loss" in summary:
        return (
            f", held-out loss {summary['held_out_loss']:.4f}, "
            f"{summary['held_out_loss'] / summary['mean_colour_loss']:.2f} of that of the mean colour"
        )
    return ""


class Shown:
    """Shows a run's events on a terminal: the start and one line per epoch on stdout, a progress bar on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Bar | None = None
        self.done = 0

    def note(self, message: str) -> None:
        complain("note", message)

    def skipped(self, path: str, reason: str) -> None:
        complain("skipped", f"{path}: {reason}")

    def checked(self, done: int, total: int) -> None:
        self._advance("reading images", done, total)

    def started(self, facts: dict[str, object]) -> None:
        self.close()
        if self.quiet:
            return
        classes = f" of {facts['classes']} classes (head: {facts['head']})" if "classes" in facts else ""
        typer.echo(
            f"training on {facts['images']:,} images{classes}, {facts['held_out']:,} held out; "
            f"{facts['parameters']:,} parameters, {facts['batch']} images a step, on {facts['device']}"
        )
        if facts["resumed_from"]:
            typer.echo(f"going on from {facts['resumed_from']}")

    def step(self, done: int, total: int) -> None:
        self._advance("training", done, total)

    def epoch(self, epoch: Epoch) -> None:
        if self.quiet:
            return
        parts = [f"epoch {epoch.epoch:g} of {epoch.epochs:g}"]
        for name, value, form in (
            ("loss", epoch.loss, ".4f"),
            ("held-out loss", epoch.held_out_loss, ".4f"),
            ("accuracy", epoch.accuracy, ".2%"),
            ("learning rate", epoch.learning_rate, ".2e"),
        ):
            if value is not None:
                parts.append(f"{name} {value:{form}}")
        line = "  ".join([*parts, f"{epoch.seconds:.0f} s"])
        if self.bar is None:
            typer.echo(line)
        else:
            with self.bar.aside(0):
                typer.echo(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__()
        self.bar, self.done = None, 0

    def _advance(self, doing: str, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = Bar(doing, total, wanted=not self.quiet and sys.stderr.isatty()).__enter__()
        self.bar.advance(done - self.done)
        self.done = done
        if done == total:
            self.close()

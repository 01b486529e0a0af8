"""``focalnet explain``: draws what a model looks at in images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .compute import Backend, Device, DType, InDType, OnDevice, backend_for, device_for, torch_dtype
from .errors import SOME_SKIPPED, UserError, printable
from .images import Images, Skipped, find_images, load_pixels, load_processor
from .inference import Classified, most_probable
from .labels import LabelsFile, use_labels
from .models import Fields, Model, UseEma, Variant, load_classifier, parse_fields, silence_transformers
from .output import Bar, report, require_matplotlib

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BaseImageProcessor

    from ..inspection import BlockMaps, Place
    from ..models.modeling import FocalNetForImageClassification

TOP = 5


class Format(str, Enum):
    png = "png"
    svg = "svg"
    both = "both"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (".png", ".svg") if self is Format.both else (f".{self.value}",)


def explain(
    images: Images,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the figures go.")],
    stages: Annotated[
        list[int] | None,
        typer.Option("--stage", metavar="N", help="Only this stage, from 1; repeat for several."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option("--block", metavar="N", help="This block of every stage, from 1; the last by default."),
    ] = None,
    animate: Annotated[bool, typer.Option("--animate", help="Write a GIF through all blocks too.")] = False,
    form: Annotated[Format, typer.Option("--format", help="Of the figures.")] = Format.both,
    variant: Variant = None,
    fields: Fields = None,
    use_ema: UseEma = None,
    labels: LabelsFile = None,
    backend: Backend = None,
    device: OnDevice = Device.auto,
    dtype: InDType = DType.float32,
) -> None:
    """Draw what a model looks at: answers, gates of every level and modulators, one figure for each image.

    A file that cannot be read is reported and skipped. Exit code: 0, or 1 if anything was skipped, or 2 if there is no
    image or no model. The paths of the figures are printed.
    """
    silence_transformers()
    require_matplotlib()
    paths, skipped = find_images(images)
    report(skipped)
    if not paths:
        raise UserError(f"no image found in {', '.join(images)}; expected files, folders or globs of images")
    where = device_for(device, backend)
    classifier = load_classifier(model, variant, parse_fields(fields), use_ema)
    shown = blocks_of(classifier, stages, block)
    use_labels(classifier.config, labels)
    classifier = classifier.to(device=where, dtype=torch_dtype(dtype, where))  # type: ignore[call-arg]  # a wrapped method
    processor = load_processor(model, classifier.config)
    names = names_for(paths)
    _make_folder(out)

    with backend_for(backend), warnings.catch_warnings(), Bar("explaining", len(paths), len(paths) > 1) as bar:
        # Pillow warns about metadata that it does not need, matplotlib about letters that its font does not have.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for path in paths:
            explained = explain_file(classifier, processor, path, None if animate else shown)
            with bar.aside(1):
                if isinstance(explained, Skipped):
                    skipped.append(explained)
                    report([explained])
                    continue
                for written in draw(explained, shown, out / names[path], form, animate):
                    typer.echo(printable(str(written)))
    if skipped:
        raise typer.Exit(SOME_SKIPPED)


@dataclass(frozen=True)
class Explained:
    """An image as the model sees it, (H, W, 3) from 0 to 1, the answers, and the maps of blocks."""

    path: Path
    image: Any
    answers: list[tuple[str, float]]
    blocks: tuple[BlockMaps, ...]


def blocks_of(model: nn.Module, stages: list[int] | None, block: int | None) -> list[Place]:
    """(stage, block) from 0 of what --stage and --block, from 1, ask for."""
    from ..inspection import places

    depths: dict[int, int] = {}
    for stage, _ in places(model):
        depths[stage] = depths.get(stage, 0) + 1
    for stage in stages or ():
        if not 1 <= stage <= len(depths):
            raise UserError(f"--stage: expected 1 to {len(depths)}, got {stage}")
    chosen = sorted(set(stages or [stage + 1 for stage in depths]))
    deepest = max(depths[stage - 1] for stage in chosen)
    if block is not None and not 1 <= block <= deepest:
        raise UserError(f"--block: expected 1 to {deepest}, got {block}")
    of_stage = {stage - 1: (block or depths[stage - 1]) - 1 for stage in chosen}
    return [(stage, index) for stage, index in of_stage.items() if index < depths[stage]]


def names_for(paths: list[Path]) -> dict[Path, str]:
    """A name without suffix for the figures of each path, different for each."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, count = path.stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name.casefold())
        # Never the name of an image, which may be in the same folder.
        names[path] = f"{name}.explained"
    return names


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: expected a folder that can be written: {error.strerror}") from None


def explain_file(
    classifier: FocalNetForImageClassification,
    processor: BaseImageProcessor,
    path: Path,
    blocks: list[Place] | None,
) -> Explained | Skipped:
    """Run the model on one file. ``blocks`` None means all."""
    pixels = load_pixels(path, processor)
    return pixels if isinstance(pixels, Skipped) else explain_pixels(classifier, processor, path, pixels, blocks)


def explain_pixels(
    classifier: FocalNetForImageClassification,
    processor: BaseImageProcessor,
    path: Path,
    pixels: Tensor,
    blocks: list[Place] | None,
) -> Explained | Skipped:
    """Run the model on ``pixels`` (3, H, W) of a file. ``blocks`` None means all."""
    from ..inspection import inspect
    from ..pictures.maps import seen_image

    found = inspect(classifier, pixels[None].to(classifier.device, classifier.dtype), blocks=blocks or "all")
    answered = most_probable(classifier, path, found.output.logits[0].float().cpu(), TOP, None)
    if not isinstance(answered, Classified):
        return answered
    answers = [(prediction.label, prediction.probability) for prediction in answered.predictions]
    return Explained(path, seen_image(pixels, processor), answers, found.maps)


def draw(explained: Explained, shown: list[Place], stem: Path, form: Format, with_animation: bool) -> list[Path]:
    """Write the figure, and the animation if asked for. Returns the paths."""
    from ..pictures import style
    from ..pictures.animation import animate
    from ..pictures.explanation import explanation

    title = printable(explained.path.name)
    blocks = [maps for maps in explained.blocks if (maps.stage, maps.block) in shown]
    figure = explanation(explained.image, blocks, explained.answers, title)
    written = [style.save(figure, stem.with_name(stem.name + suffix)) for suffix in form.suffixes]
    if with_animation:
        written.append(animate(explained.image, explained.blocks, title, stem.with_name(stem.name + ".gif")))
    return written

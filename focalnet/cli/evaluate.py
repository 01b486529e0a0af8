"""``focalnet evaluate``: measures the top-1 and top-5 accuracy of a classifier on a folder of classes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..training import processes
from .compute import Backend, Device, DType, InDType, OnDevice, backend_for, device_for, torch_dtype
from .errors import SOME_SKIPPED, UserError, printable
from .images import Skipped, load_processor
from .inference import Classified, classify_files
from .labelled import LabelledImage, find_labelled_images
from .labels import LabelsFile, use_labels
from .models import Fields, Model, UseEma, Variant, load_classifier, parse_fields, silence_transformers
from .output import Bar, report
from .record import Record

TOP = 5
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


@dataclass(frozen=True)
class Accuracy:
    """The share of images whose correct class was the most probable one (top1) or among the five most probable."""

    images: int
    top1: float
    top5: float

    @classmethod
    def of(cls, ranks: list[int | None]) -> Accuracy:
        """``ranks``: the rank of the correct class of each image, from 0, or None if it was not among the five."""
        images = len(ranks)
        return cls(images, ranks.count(0) / images, sum(rank is not None for rank in ranks) / images)


def evaluate(
    data: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with one folder of images for each class, such as val/.")
    ],
    model: Model,
    variant: Variant = None,
    fields: Fields = None,
    use_ema: UseEma = None,
    labels: LabelsFile = None,
    among_folders: Annotated[
        bool,
        typer.Option(
            "--among-folders", help="Choose only among classes with a folder, e.g. ImageNet-1K's of a 22K model."
        ),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(help="A file for the result of every image; an interrupted run continues from it."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in one pass.")] = 32,
    backend: Backend = None,
    device: OnDevice = Device.auto,
    dtype: InDType = DType.float32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Check a classifier's accuracy on a folder of classes, such as ImageNet's validation set.

    The name of a class folder is one of the model's labels, a WordNet id (n01440764, ...) or an index. WordNet ids
    need a model with ImageNet's 1000 or 21,842 classes, or --labels with ids. Otherwise there must be as many folders
    as labels, in alphabetical order. A file that cannot be read is reported and left out. Exit code: 0, or 1 if any
    file was left out, or 2 if there is nothing to evaluate. Started by torchrun or accelerate launch, each process
    takes its share of the images, and the first one prints the result of all.
    """
    silence_transformers()
    where = processes.device_here(device_for(device, backend))
    classifier = load_classifier(model, variant, parse_fields(fields), use_ema)
    ids = use_labels(classifier.config, labels)
    classifier = classifier.to(device=where, dtype=torch_dtype(dtype, where))  # type: ignore[call-arg]  # a wrapped method
    if classifier.config.problem_type == "multi_label_classification":
        raise UserError(f"--model {model}: expected a model with one label an image, this one gives several")
    processor = load_processor(model, classifier.config)
    images = find_labelled_images(data, classifier.config, ids)
    among = sorted({image.label for image in images}) if among_folders else None
    computing_in = str(classifier.dtype).removeprefix("torch.")
    run: dict[str, object] = {
        "model": model,
        "data": str(data.resolve()),
        "dtype": computing_in,
        "images": len(images),
    }
    if among is not None:
        run["among"] = f"{len(among)} of {classifier.config.num_labels} classes"

    processes.meet(on_cpu=True)
    is_first = processes.rank() == 0
    with Record(_record_here(record), run) as results:
        known = _merged(results.ranks)
        todo = _share([image for image in images if image.name not in known], batch_size)
        start = time.perf_counter()
        with (
            backend_for(backend),
            Bar("evaluating", len(known) + len(todo), wanted=is_first and not as_json) as bar,
            _interruptible(results, record, len(images)),
        ):
            bar.advance(len(known))
            batches = classify_files(classifier, processor, [image.path for image in todo], TOP, batch_size, among)
            skipped = _collect(batches, todo, results, bar)
        seconds = max(processes.gathered(time.perf_counter() - start))
    ranks = known | _merged(results.ranks)
    skipped = _of_all(skipped)
    done = sum(processes.gathered(len(todo))) - len(skipped)
    processes.leave()
    if not is_first:
        return
    if not ranks:
        raise UserError(f"DIR: none of the {len(images)} images in {data} could be read")

    accuracy = asdict(Accuracy.of(list(ranks.values())))
    facts = {**run, **accuracy, "images_this_run": done, "images_per_second": done / seconds}
    if as_json:
        typer.echo(json.dumps({**facts, "errors": list(map(asdict, skipped))}, indent=2))
    else:
        _print(facts)
    if skipped:
        raise typer.Exit(SOME_SKIPPED)


def _record_here(record: Path | None) -> Path | None:
    """Each process has a file of its own; the first one's is ``record``."""
    if record is None or processes.rank() == 0:
        return record
    return record.with_name(f"{record.name}.{processes.rank()}")


def _merged(ranks: dict[str, int | None]) -> dict[str, int | None]:
    """The results of all processes. An image that several of them have is counted once."""
    return {name: rank for of_one in processes.gathered(ranks) for name, rank in of_one.items()}


def _share(images: list[LabelledImage], batch_size: int) -> list[LabelledImage]:
    """The images of this process: whole batches, so that each batch holds what it would hold in one process."""
    starts = range(processes.rank() * batch_size, len(images), processes.count() * batch_size)
    return [image for start in starts for image in images[start : start + batch_size]]


def _of_all(skipped: list[Skipped]) -> list[Skipped]:
    """The files that any process could not read. The first process reports those of the others."""
    own, *others = processes.gathered(skipped)
    rest = [one for of_one in others for one in of_one]
    if processes.rank() == 0:
        report(rest)
    return [*own, *rest]


def _collect(
    batches: Iterator[list[Classified | Skipped]], todo: list[LabelledImage], results: Record, bar: Bar
) -> list[Skipped]:
    """Add the results to the record as they arrive. Returns the files that could not be read."""
    by_path = {str(image.path): image for image in todo}
    skipped: list[Skipped] = []
    for batch in batches:
        bad = [result for result in batch if isinstance(result, Skipped)]
        good = [result for result in batch if isinstance(result, Classified)]
        with bar.aside(len(batch)):
            report(bad if processes.rank() == 0 else [])
        skipped += bad
        results.add({by_path[one.path].name: _rank(one, by_path[one.path].label) for one in good})
    return skipped


def _rank(result: Classified, label: int) -> int | None:
    indices = [prediction.index for prediction in result.predictions]
    return indices.index(label) if label in indices else None


@contextmanager
def _interruptible(results: Record, record: Path | None, total: int) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        advice = "the same command goes on from there" if record else "with --record FILE it could go on from there"
        typer.echo(f"interrupted after {len(results.ranks)} of {total} images; {advice}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _print(facts: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = printable(f"{facts['model']} on {facts['data']}")
    table = Table(title=Text(title, overflow="fold"), title_justify="left", title_style="bold", show_header=False)
    table.add_column(min_width=24)
    table.add_column(justify="right")
    table.add_row("images", f"{facts['images']}")
    if "among" in facts:
        table.add_row("chosen among", f"{facts['among']}")
    table.add_row("top-1", f"{facts['top1']:.2%}")
    table.add_row("top-5", f"{facts['top5']:.2%}")
    if facts["images_this_run"]:
        table.add_row("images a second", f"{facts['images_per_second']:.1f}, reading included")
    Console(highlight=False).print(table)

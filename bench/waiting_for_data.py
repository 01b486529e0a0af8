"""Measures the share of a first epoch that training waits for images: `focalnet finetune` on a folder of JPEGs.

    python bench/waiting_for_data.py [--steps 12 --batch 16] [--write]     2 minutes on two cores

The folder holds JPEGs of 500 x 375 pixels, ImageNet's usual size: crops of the photographs in scikit-image, in two
classes. FocalNet-T LRF is trained on them at 224 x 224 with the recipe `finetune` (random crops, RandAugment, erasing)
and the recipe's workers, by the function that the command calls. Waiting is the time inside the call that takes the
next batch from the loader; the first one includes the start of the workers. The total goes from the first such call
to the end of the last step, without the evaluation behind it.

A second figure says how far the pipeline is from becoming the limit: the images a second that it delivers alone. With
--write the row goes to bench/results/<device>/waiting_for_data.json.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import datasets
import typer
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.cli.models import silence_transformers
from focalnet.cli.training import reader
from focalnet.training import Run, Settings, finetune, load_recipe
from focalnet.training.batches import ClassificationBatch
from focalnet.training.events import Events
from focalnet.training.models import Start
from focalnet.training.sources import load_source
from focalnet.training.trainer import FocalNetTrainer
from focalnet.training.views import TrainingViews

KIND = "waiting_for_data"
VARIANT = "tiny_lrf"
SIZE = (500, 375)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
CLASSES = ("first", "second")
HELD_OUT = 2  # of each class: the evaluation is not measured
JPEG_QUALITY = 90

console = Console()


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of the epoch.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 16,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare images; default: the recipe's.")] = None,
    keep: Annotated[bool, typer.Option("--write", help="Write the row to bench/results/.")] = False,
) -> None:
    """Train one epoch and print the share of waiting."""
    datasets.disable_progress_bars()
    silence_transformers()
    settings = load_recipe("finetune").settings.but(epochs=1, batch_size=batch, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "data", steps * batch)
        found = waiting(root / "data", root / "run", settings, Start(VARIANT)) | {
            "images_per_s_alone": alone(root / "data", settings)
        }
    row = {"case": "first epoch", "variant": VARIANT, "size": settings.image_size, "batch": batch, **found}
    console.print(
        f"waited {row['waited_s']:.2f} of {row['total_s']:.1f} s: {row['share']:.1%} "
        f"({row['share_after_first']:.1%} after the first batch)\n"
        f"the pipeline alone delivers {row['images_per_s_alone']:.0f} images/s, training takes "
        f"{row['images_per_s']:.1f} images/s"
    )
    if keep:
        environment = facts()
        write([row | environment], KIND, environment["device"])


def write_photographs(root: Path, images: int) -> None:
    """Write ``images`` JPEGs to train on and a few to hold out, in folders of classes under train/ and val/."""
    sources = [_photograph(name) for name in PHOTOGRAPHS]
    for split, count in (("train", images), ("val", HELD_OUT * len(CLASSES))):
        for number in range(count):
            folder = root / split / CLASSES[number % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            crop = _crop(sources[number % len(sources)], random.Random(f"{split} {number}"))
            crop.save(folder / f"{number:05d}.jpg", quality=JPEG_QUALITY)


def _photograph(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A random part of ``image`` with the proportions of `SIZE`, resized to it."""
    width = rng.uniform(0.6, 1) * min(image.width, image.height * SIZE[0] / SIZE[1])
    height = width * SIZE[1] / SIZE[0]
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return image.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


@dataclass
class Clock(Events):
    """When each batch was asked for and came, and when the last step ended."""

    asked: list[float] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    ended: float = 0.0

    def step(self, done: int, total: int) -> None:
        self.ended = time.perf_counter()

    def timed(self, take: Any) -> Any:
        """``take``, the Trainer's method that takes batches from the loader, with its calls timed."""

        def timed(trainer: FocalNetTrainer, *args: object, **kwargs: object) -> object:
            self.asked.append(time.perf_counter())
            taken = take(trainer, *args, **kwargs)
            self.came.append(time.perf_counter())
            return taken

        return timed

    def row(self) -> dict[str, float]:
        waits = [came - asked for asked, came in zip(self.asked, self.came, strict=True)]
        total = self.ended - self.asked[0]
        return {
            "waited_s": sum(waits),
            "total_s": total,
            "share": sum(waits) / total,
            "share_after_first": sum(waits[1:]) / (self.ended - self.came[0]),
            "longest_wait_s": max(waits),
            "steps": len(waits),
        }


def waiting(data: Path, output: Path, settings: Settings, start: Start) -> dict[str, float]:
    """Train for an epoch. Returns what was waited, and the images a second."""
    clock = Clock()
    run = Run(str(data), output, settings, reader(), start, device="cpu", check=False)
    with mock.patch.object(FocalNetTrainer, "get_batch_samples", clock.timed(FocalNetTrainer.get_batch_samples)):
        finetune(run, clock)
    row = clock.row()
    return row | {"workers": settings.workers, "images_per_s": row["steps"] * settings.batch_size / row["total_s"]}


def alone(data: Path, settings: Settings) -> float:
    """The images a second of the same pipeline when nothing trains, without the first batch of each worker."""
    table = load_source(str(data), reader(), labelled=True).train
    loader = DataLoader(
        TrainingViews(table, reader(), settings, list(range(len(CLASSES)))),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        collate_fn=ClassificationBatch(settings),
        drop_last=True,
    )
    batches = iter(loader)
    for _ in itertools.islice(batches, max(1, settings.workers)):
        pass
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * settings.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    typer.run(main)

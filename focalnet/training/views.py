"""The views of images that a model gets in training: random crops that depend on the seed, the epoch and the image.

They do not depend on the process that makes them or on earlier random numbers. A run that is resumed, or spread over
several processes, therefore gets the same views as an uninterrupted run.
"""

from __future__ import annotations

import math
import random

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from .checking import image_of
from .settings import Settings
from .sources import ImageReader

# Decoded images are kept in memory if they take at most this many bytes in total.
_MAX_KEPT = 64 * 2**20


def draw(*parts: int) -> int:
    """A seed of 63 bits that depends on all ``parts``."""
    words = np.random.SeedSequence(parts).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


class _Images:
    """The images of a table, kept in memory if they are small."""

    def __init__(self, table: datasets.Dataset, reader: ImageReader) -> None:
        self.table, self.reader = table, reader
        self.kept: dict[int, Image.Image] | None = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        cell = self.table[index]["image"]
        try:
            image = image_of(cell, self.reader)
        except Exception as error:
            raise ValueError(f"{cell['path']}: {self.reader.explain(error)}; it could be read before") from error
        if self.kept is not None:
            self._keep(index, image)
        return image

    def _keep(self, index: int, image: Image.Image) -> None:
        self.kept[index] = image
        self.bytes += 3 * image.width * image.height
        if self.bytes > _MAX_KEPT:
            self.kept = None


def _labels(table: datasets.Dataset, places: list[int] | None) -> list[int] | None:
    """The labels of the table, or their places among a head's outputs."""
    if places is None or "label" not in table.column_names:
        return None
    return [places[label] for label in table["label"]]


class TrainingViews(Dataset):
    """Random crops: ``{"pixels": uint8 (3, size, size), "index": int, "seed": int}``, and the label, if any."""

    def __init__(
        self, table: datasets.Dataset, reader: ImageReader, settings: Settings, places: list[int] | None = None
    ) -> None:
        self.images = _Images(table, reader)
        self.labels = _labels(table, places)
        self.settings = settings
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        seed = draw(self.settings.seed, self.epoch, index)
        pixels = random_view(self.images[index], self.settings, random.Random(seed))
        example: dict[str, object] = {"pixels": pixels, "index": index, "seed": seed}
        if self.labels is not None:
            example["label"] = self.labels[index]
        return example


class EvaluationViews(Dataset):
    """Images processed by the saved processor: ``{"pixel_values": float32 (3, H, W)}``, and the label if any."""

    def __init__(
        self,
        table: datasets.Dataset,
        reader: ImageReader,
        processor: BaseImageProcessor,
        places: list[int] | None = None,
    ) -> None:
        self.images = _Images(table, reader)
        self.labels = _labels(table, places)
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        pixels = self.processor(images=self.images[index], return_tensors="pt")["pixel_values"][0]
        example: dict[str, object] = {"pixel_values": pixels, "index": index}
        if self.labels is not None:
            example["label"] = self.labels[index]
        return example


def random_view(image: Image.Image, settings: Settings, rng: random.Random) -> Tensor:
    """A random crop of ``image`` (Szegedy et al., arXiv:1409.4842), resized, perhaps mirrored: uint8 (3, size, size).

    It uses Pillow, because kornia crops batches of one size and files have any size. Pillow crops and resizes in one
    pass.
    """
    size = settings.image_size
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=_box(*image.size, settings.crop_scale, rng))
    if rng.random() < settings.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    if scale == (1, 1):
        return 0, 0, width, height
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side

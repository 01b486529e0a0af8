"""Classifies image files in batches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .images import Skipped, load_pixels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor

    from ..models.modeling import FocalNetForImageClassification


@dataclass(frozen=True)
class Prediction:
    """A predicted label of an image, with its index and probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Classified:
    """An image with its most probable labels, the most probable first."""

    path: str
    predictions: list[Prediction]


def classify_files(
    classifier: FocalNetForImageClassification,
    processor: BaseImageProcessor,
    paths: list[Path],
    top_k: int,
    batch_size: int,
    among: list[int] | None = None,
) -> Iterator[list[Classified | Skipped]]:
    """Classify ``paths`` and yield the results of ``batch_size`` of them at a time.

    ``among`` holds the indices of the labels to choose from; None means all. The files of a batch are decoded in
    parallel, while the model works on the previous batch.
    """
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        # Pillow warns about metadata and palettes even if it can read the image.
        warnings.filterwarnings("ignore", module="PIL")
        decode = functools.partial(pool.map, lambda path: load_pixels(path, processor))
        ahead = decode(batches[0]) if batches else iter(())
        for batch, following in pairwise([*batches, []]):
            decoded, ahead = ahead, decode(following)
            yield _results(classifier, list(zip(batch, decoded, strict=True)), top_k, among)


def _results(
    classifier: FocalNetForImageClassification,
    loaded: list[tuple[Path, Tensor | Skipped]],
    top_k: int,
    among: list[int] | None,
) -> list[Classified | Skipped]:
    results: list[Classified | Skipped] = [pixels for _, pixels in loaded if isinstance(pixels, Skipped)]
    readable = [(path, pixels) for path, pixels in loaded if not isinstance(pixels, Skipped)]
    # A processor without a crop returns images of several sizes.
    for _, same_size in groupby(readable, key=lambda item: item[1].shape):
        results += _classify(classifier, list(same_size), top_k, among)
    return results


def _classify(
    classifier: FocalNetForImageClassification,
    batch: list[tuple[Path, Tensor]],
    top_k: int,
    among: list[int] | None,
) -> list[Classified | Skipped]:
    import torch

    pixel_values = torch.stack([pixels for _, pixels in batch])
    with torch.inference_mode():
        logits = classifier(pixel_values.to(classifier.device, classifier.dtype)).logits.float().cpu()
    return [most_probable(classifier, path, row, top_k, among) for (path, _), row in zip(batch, logits, strict=True)]


def most_probable(
    classifier: FocalNetForImageClassification, path: Path, logits: Tensor, top_k: int, among: list[int] | None
) -> Classified | Skipped:
    """The ``top_k`` labels of one image's ``logits``, or the reason why there are none."""
    config = classifier.config
    if not logits.isfinite().all():
        return Skipped(str(path), f"the model's output in {classifier.dtype} is not finite; try --dtype float32")
    choice = range(len(logits)) if among is None else among
    logits = logits if among is None else logits[among]
    # With multiple labels per image, or a single label, each label is an independent yes or no, as in transformers'
    # pipeline.
    independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
    probabilities = logits.sigmoid() if independent else logits.softmax(-1)
    values, places = probabilities.topk(min(top_k, len(probabilities)))
    indices = [choice[place] for place in places.tolist()]
    return Classified(
        str(path),
        [
            Prediction((config.id2label or {}).get(index, f"LABEL_{index}"), index, value)
            for value, index in zip(values.tolist(), indices, strict=True)
        ],
    )

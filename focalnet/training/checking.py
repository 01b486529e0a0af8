"""Finds unreadable images of a source: every image is decoded once before training starts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from PIL import Image

from .sources import ImageReader, Source


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and the reason."""

    path: str
    error: str


def image_of(row: dict[str, object], reader: ImageReader) -> Image.Image:
    """The RGB image in a cell of a table, ``{"bytes", "path"}``. Exceptions are those of the reader."""
    name = Path(str(row["path"] or "an image without a name"))
    if row["bytes"] is not None:
        return reader.read(io.BytesIO(row["bytes"]), name.name)
    return reader.read(name, name.name)


def without_unreadable(
    source: Source, reader: ImageReader, strict: bool, report: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Source, list[Unreadable]]:
    """The source without unreadable images, and a list of those.

    ``report`` is called with the number of images checked so far and the total.

    Raises:
        ValueError: an image is unreadable and ``strict`` is set, or all images are unreadable.
    """
    tables = {name: getattr(source, name) for name in ("train", "held_out")}
    total = sum(len(table) for table in tables.values() if table is not None)
    kept: dict[str, datasets.Dataset | None] = {}
    bad, done = [], 0
    with ThreadPoolExecutor() as pool:
        for name, table in tables.items():
            if table is None:
                kept[name] = None
                continue
            errors = []
            for error in pool.map(lambda row: _error(row, reader), _cells(table)):
                errors.append(error)
                done += 1
                report(done, total)
            bad += [error for error in errors if error is not None]
            good = [index for index, error in enumerate(errors) if error is None]
            kept[name] = table if len(good) == len(table) else table.select(good)
    if bad and strict:
        some = "; ".join(f"{one.path}: {one.error}" for one in bad[:3])
        raise ValueError(f"DATA {source.name}: {len(bad)} of {total} images cannot be read (--strict): {some}")
    if not len(kept["train"]):
        raise ValueError(f"DATA {source.name}: none of its {total} images can be read: {bad[0].path}: {bad[0].error}")
    return replace(source, **kept), bad


def _cells(table: datasets.Dataset) -> Iterator[dict[str, object]]:
    return (table[index]["image"] for index in range(len(table)))


def _error(cell: dict[str, object], reader: ImageReader) -> Unreadable | None:
    try:
        image_of(cell, reader)
    # Decoders raise many kinds of exceptions on damaged files.
    except Exception as error:
        return Unreadable(str(cell["path"]), reader.explain(error))
    return None

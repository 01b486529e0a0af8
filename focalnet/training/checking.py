"""Finds unreadable images of a source: every image is decoded once before training starts."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from PIL import Image

from . import processes
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

    Several processes share the work, and each gets the result of all. ``report`` is called with the number of images
    that this process has checked and its share.

    Raises:
        ValueError: an image is unreadable and ``strict`` is set, or all images are unreadable.
    """
    tables = {name: getattr(source, name) for name in ("train", "held_out")}
    total = sum(len(table) for table in tables.values() if table is not None)
    shares = {name: range(processes.rank(), len(table), processes.count()) for name, table in tables.items() if table}
    mine, done = sum(map(len, shares.values())), 0
    kept: dict[str, datasets.Dataset | None] = dict(tables)
    bad = []
    with ThreadPoolExecutor() as pool:
        for name, share in shares.items():
            table, errors = tables[name], {}
            cells = (table[index]["image"] for index in share)
            for index, error in zip(share, pool.map(lambda cell: _error(cell, reader), cells), strict=True):
                done += 1
                report(done, mine)
                if error is not None:
                    errors[index] = error
            errors = {index: error for of_one in processes.gathered(errors) for index, error in of_one.items()}
            bad += [errors[index] for index in sorted(errors)]
            if errors:
                kept[name] = table.select([index for index in range(len(table)) if index not in errors])
    if bad and strict:
        some = "; ".join(f"{one.path}: {one.error}" for one in bad[:3])
        raise ValueError(f"DATA {source.name}: {len(bad)} of {total} images cannot be read (--strict): {some}")
    if not len(kept["train"]):
        raise ValueError(f"DATA {source.name}: none of its {total} images can be read: {bad[0].path}: {bad[0].error}")
    return replace(source, **kept), bad


def _error(cell: dict[str, object], reader: ImageReader) -> Unreadable | None:
    try:
        image_of(cell, reader)
    # Decoders raise many kinds of exceptions on damaged files.
    except Exception as error:
        return Unreadable(str(cell["path"]), reader.explain(error))
    return None

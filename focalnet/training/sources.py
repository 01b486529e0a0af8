"""Loads data by name as two tables: the training images and the held-out images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import datasets

from .built_in import BUILT_IN

if TYPE_CHECKING:
    from PIL import Image

HELD_OUT_SPLITS = ("validation", "val", "valid", "test")
_IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")


@dataclass(frozen=True)
class ImageReader:
    """How image files are read. The caller provides it, so that training reads files exactly as inference does.

    Attributes:
        read: takes a path or an open file, and its name; returns an RGB image.
        suffixes: the suffixes of image files, in lower case.
        explain: takes an exception of ``read``; returns the reason to report.
    """

    read: Callable[[Path | IO[bytes], str], Image.Image]
    suffixes: frozenset[str]
    explain: Callable[[Exception], str]


@dataclass(frozen=True)
class Source:
    """Tables with the columns ``image`` (datasets.Image, not decoded) and, if there are labels, ``label``."""

    name: str
    train: datasets.Dataset
    held_out: datasets.Dataset | None
    labels: list[str] | None


def load_source(data: str, reader: ImageReader, labelled: bool) -> Source:
    """Load ``data``: a folder of images or of classes, parquet files, a built-in data set, or one on the hub.

    A folder may contain the folders train and val (or validation, valid, test). If the data has no held-out split,
    every fifth image of each class is held out, the same ones in every run. The images of a folder are in the order of
    their names.

    Raises:
        ValueError: there is no such data, no image in it, or with ``labelled`` fewer than two classes.
    """
    path = Path(data).expanduser()
    if path.is_dir() and not _parquet_in(path):
        tables = _folder(path, reader, labelled)
    elif path.exists():
        tables = _parquet(path)
    elif data in BUILT_IN:
        tables = {"train": BUILT_IN[data]()}
    else:
        tables = _from_hub(data)
    tables = {split: _with_our_columns(table, data, labelled) for split, table in tables.items()}
    return _split(data, tables, labelled)


def _folder(root: Path, reader: ImageReader, labelled: bool) -> dict[str, datasets.Dataset]:
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    splits = {"train": root}
    if "train" in folders:
        held_out = next((name for name in HELD_OUT_SPLITS if name in folders), None)
        splits = {name: folders[name] for name in ("train", held_out) if name}
    if not labelled:
        return {name: _table(_images_in(path, reader), None, None, path, reader) for name, path in splits.items()}
    classes = sorted(path.name for path in splits["train"].iterdir() if _is_class(path, reader))
    return {name: _class_folders(path, classes, reader) for name, path in splits.items()}


def _is_class(path: Path, reader: ImageReader) -> bool:
    return path.is_dir() and not path.name.startswith(".") and next(iter(_walk(path, reader)), None) is not None


def _class_folders(root: Path, classes: list[str], reader: ImageReader) -> datasets.Dataset:
    others = sorted(path.name for path in root.iterdir() if path.name not in classes and _is_class(path, reader))
    if others:
        raise ValueError(f"DATA {root}: the class folders {', '.join(others[:5])} are not among those to train on")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_in(root / name, reader) if (root / name).is_dir() else []
        paths += found
        labels += [label] * len(found)
    return _table(paths, labels, classes, root, reader)


def _walk(folder: Path, reader: ImageReader) -> Iterable[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix.lower() in reader.suffixes and not name.startswith("."):
                yield Path(parent, name)


def _images_in(folder: Path, reader: ImageReader) -> list[Path]:
    return sorted(_walk(folder, reader))


def _table(
    paths: list[Path], labels: list[int] | None, classes: list[str] | None, folder: Path, reader: ImageReader
) -> datasets.Dataset:
    if not paths:
        where = "no image in its class folders" if classes is not None else "no image in it"
        raise ValueError(f"DATA {folder}: {where} (looked for {', '.join(sorted(reader.suffixes))})")
    columns: dict[str, list] = {"image": [{"bytes": None, "path": str(path)} for path in paths]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    if classes is not None and labels is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=classes)
    return datasets.Dataset.from_dict(columns, features=features)


def _parquet_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def _parquet(path: Path) -> dict[str, datasets.Dataset]:
    files = _parquet_in(path) if path.is_dir() else [path]
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(
            f"DATA {path}: expected a folder of images or a .parquet file, got a {path.suffix or 'plain'} file"
        )
    by_split: dict[str, list[str]] = {}
    for file in files:
        is_held_out = any(name in file.relative_to(path.parent).as_posix().lower() for name in HELD_OUT_SPLITS)
        by_split.setdefault("validation" if is_held_out and len(files) > 1 else "train", []).append(str(file))
    if "train" not in by_split:
        by_split = {"train": [str(file) for file in files]}
    try:
        return {split: datasets.Dataset.from_parquet(names) for split, names in by_split.items()}
    except Exception as error:
        raise ValueError(f"DATA {path}: cannot be read as parquet: {error}") from error


def _from_hub(name: str) -> dict[str, datasets.Dataset]:
    there = f"no such file or folder, and no data set inside ({', '.join(BUILT_IN)})"
    try:
        found = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"DATA {name}: {there}; nor can it be had from the hub: {reason}") from error
    if "train" not in found:
        raise ValueError(f"DATA {name}: expected a split named train, it has {', '.join(found)}")
    held_out = next((split for split in HELD_OUT_SPLITS if split in found), None)
    return {split: found[split] for split in ("train", held_out) if split}


def _with_our_columns(table: datasets.Dataset, data: str, labelled: bool) -> datasets.Dataset:
    image = _column(table, _IMAGE_COLUMNS, datasets.Image)
    if image is None:
        raise ValueError(f"DATA {data}: no column of images; the columns are {', '.join(table.column_names)}")
    label = _column(table, _LABEL_COLUMNS, datasets.ClassLabel)
    if label is None and labelled:
        raise ValueError(
            f"DATA {data}: expected a label for each image (a folder for each class, or a column named "
            f"{' or '.join(_LABEL_COLUMNS[:2])}), there are {', '.join(table.column_names)} alone"
        )
    kept = [column for column in (image, label if labelled else None) if column is not None]
    table = table.select_columns(kept).rename_columns(dict(zip(kept, ("image", "label"), strict=False)))
    table = table.cast_column("image", datasets.Image(decode=False))
    if labelled and not isinstance(table.features["label"], datasets.ClassLabel):
        table = _with_class_labels(table, data)
    return table


def _column(table: datasets.Dataset, names: tuple[str, ...], kind: type) -> str | None:
    of_kind = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    return next(iter([*of_kind, *(name for name in names if name in table.column_names)]), None)


def _with_class_labels(table: datasets.Dataset, data: str) -> datasets.Dataset:
    values = table["label"]
    if any(value is None for value in values):
        raise ValueError(f"DATA {data}: a label is missing")
    if table.features["label"].dtype.startswith(("int", "uint")):
        if min(values) < 0:
            raise ValueError(f"DATA {data}: expected labels from 0 on, got {min(values)}")
        return table.cast_column("label", datasets.ClassLabel(names=[str(index) for index in range(max(values) + 1)]))
    return table.class_encode_column("label")


def _split(data: str, tables: dict[str, datasets.Dataset], labelled: bool) -> Source:
    train = tables["train"]
    held_out = next((table for split, table in tables.items() if split != "train"), None)
    names = list(train.features["label"].names) if labelled else None
    if names is not None and held_out is not None and held_out.features["label"].names != names:
        raise ValueError(f"DATA {data}: the classes that are held out are not those to train on")
    if held_out is None:
        fifth = every_fifth(train["label"] if labelled else [0] * len(train))
        is_held_out = set(fifth)
        held_out = train.select(fifth) if fifth else None
        train = train.select([index for index in range(len(train)) if index not in is_held_out])
    if names is not None:
        seen = sorted(set(train["label"]))
        if len(seen) < 2:
            only = names[seen[0]] if seen else "none"
            raise ValueError(f"DATA {data}: expected images of at least two classes, got one: {only}")
    return Source(data, train, held_out, names)


def every_fifth(labels: list[int]) -> list[int]:
    """The indices of every fifth image of each class. A class with two to four images gives its last one."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    chosen = [of_class[4::5] or of_class[1:][-1:] for of_class in places.values()]
    return sorted(place for of_class in chosen for place in of_class)

"""Finds the images in a folder of classes, each with the index of its correct label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .images import Skipped, find_images

if TYPE_CHECKING:
    from ..configuration import FocalNetConfig


@dataclass(frozen=True)
class LabelledImage:
    """A file, its name within the folder of classes, and the index of its label."""

    path: Path
    name: str
    label: int


def find_labelled_images(folder: Path, config: FocalNetConfig, ids: list[str] | None = None) -> list[LabelledImage]:
    """The images of all class folders in ``folder``, class by class. ``ids`` are the WordNet ids of the classes.

    Raises:
        UserError: the folder does not exist or has no images, or its folders do not match the model's classes.
    """
    if not folder.is_dir():
        raise UserError(f"DIR: expected a folder with one folder for each class, got {folder}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    labels = _labels([path.name for path in classes], config, ids, folder)
    found = []
    for path, label in zip(classes, labels, strict=True):
        images, empty = find_images([str(path)])
        if not any(isinstance(one, Skipped) for one in empty):
            found += [LabelledImage(image, image.relative_to(folder).as_posix(), label) for image in images]
    if not found:
        raise UserError(f"DIR: no image found in the class folders of {folder}")
    return found


def _labels(names: list[str], config: FocalNetConfig, ids: list[str] | None, folder: Path) -> list[int]:
    """The label of each class folder, by name, by WordNet id, by a number as name, or by alphabetical order."""
    id2label: Any = config.id2label
    by_name: dict[str, int] = {label: index for index, label in id2label.items()}
    by_id = {wordnet_id: index for index, wordnet_id in enumerate(ids or [])}
    for index_of in (by_name, by_id):
        if names and all(name in index_of for name in names):
            return [index_of[name] for name in names]
    if names and all(name.isdecimal() and int(name) < (config.num_labels or 0) for name in names):
        return [int(name) for name in names]
    if len(names) == config.num_labels:
        return list(range(len(names)))
    some = ", ".join([*map(repr, names[:3]), *(["..."] if len(names) > 3 else [])])
    raise UserError(
        f"DIR: expected class folders named by the model's labels ({id2label[0]!r}, ...), by WordNet id, or by "
        f"index, or exactly {config.num_labels} of them in alphabetical order; {folder} has {len(names)} "
        f"({some or 'none'})"
    )

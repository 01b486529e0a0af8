"""Reads the names of a model's outputs from --labels, and the WordNet ids, which name ImageNet's folders."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UserError

if TYPE_CHECKING:
    from ..configuration import FocalNetConfig

LabelsFile = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Names of the model's outputs, in order: one per line, or a JSON list or object.",
    ),
]
_WITH_ID = re.compile(r"(n\d{8})[\s,]+(\S.*)")


@dataclass(frozen=True)
class Labels:
    """``names`` by index, and the WordNet ``ids`` of the classes if the file has them."""

    names: list[str]
    ids: list[str] | None = None


def use_labels(config: FocalNetConfig, file: Path | None) -> list[str] | None:
    """Name a model's outputs by the labels in ``file``, if one is given.

    Returns:
        The WordNet ids of the classes: those of the file, else ImageNet's if the model has as many classes as
        ImageNet-1K or 22K, else None.

    Raises:
        UserError: the file cannot be read, or does not have one label for each output.
    """
    from ..checkpoints.imagenet import class_ids

    known = class_ids(config.num_labels)
    if file is None:
        return known
    labels = _read(file)
    if len(labels.names) != config.num_labels:
        raise UserError(
            f"--labels {file}: expected {config.num_labels} labels, one for each output of the model, "
            f"got {len(labels.names)}"
        )
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: index for index, name in enumerate(labels.names)}
    return labels.ids or known


def _read(file: Path) -> Labels:
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {file}: cannot be read as text: {error}") from None
    entries = _from_json(text, file) if text.lstrip()[:1] in ("[", "{") else text.strip().splitlines()
    matches = [match for entry in entries if (match := _WITH_ID.fullmatch(entry.strip()))]
    if entries and len(matches) == len(entries):
        return Labels([match[2] for match in matches], [match[1] for match in matches])
    return Labels([entry.strip() for entry in entries])


def _from_json(text: str, file: Path) -> list[str]:
    """The names in a list, or in an object from index to name. A pair is an id and a name, as in Keras' file."""
    expected = f"--labels {file}: expected a JSON list of names, or an object from 0, 1, ... to names"
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{expected}: {error}") from None
    if isinstance(content, dict):
        indices = [str(index) for index in range(len(content))]
        if set(content) != set(indices):
            raise UserError(f"{expected}; got the keys {', '.join(list(content)[:3])}, ...")
        content = [content[index] for index in indices]
    entries = [" ".join(map(str, entry)) if isinstance(entry, list) else entry for entry in content]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{expected}; got {next(entry for entry in entries if not isinstance(entry, str))!r} in it")
    return entries

"""Rejects arguments that are obviously not checkpoints, such as images, with a clear message.

Checkpoints of other architectures are rejected when they are read (checkpoints/foreign.py).
"""

from __future__ import annotations

from pathlib import Path

from .errors import UserError
from .images import EXTENSIONS

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")


def refuse_what_is_no_checkpoint(model: str) -> None:
    """Raise UserError if ``model`` is obviously not a checkpoint; the message says what it is and what to give.

    Hub ids and paths that may be checkpoints pass.
    """
    path = Path(model).expanduser()
    reason = _why_not_folder(path) if path.is_dir() else _why_not_file(path) if path.is_file() else None
    if reason is not None:
        raise UserError(reason)


def _why_not_file(path: Path) -> str | None:
    if path.suffix.lower() in EXTENSIONS:
        return "this is an image; expected a checkpoint: a file of weights, a folder with them, or a hub id"
    return None


def _why_not_folder(path: Path) -> str | None:
    if _weights_in(path):
        return None
    if any(entry.suffix.lower() in EXTENSIONS for entry in path.iterdir()):
        return "this is a folder of images without any weights; expected a checkpoint"
    subfolders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and _weights_in(entry))
    if subfolders:
        return f"this folder holds no weights itself; give one of its folders that do: {', '.join(subfolders[:5])}"
    return None


def _weights_in(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix in WEIGHTS]

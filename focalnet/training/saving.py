"""Writes checkpoints atomically: into a temporary folder, with a list of files, flushed to disk, and then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

STAGING = ".being-written"
MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def why_not_whole(folder: Path) -> str | None:
    """Why a checkpoint is not complete, by the file sizes listed when it was written; None if it is complete."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST} in it"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in ``root``, the latest last."""
    found = [(int(match[1]), path) for path in root.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if why_not_whole(path) is None]


def publish(folder: Path, destination: Path) -> None:
    """Flush ``folder``, whose files are all written, to disk and rename it to ``destination`` atomically."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush(path)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)
    _flush(folder)
    if destination.exists():  # an incomplete checkpoint of an interrupted run, or one that is written again
        shutil.rmtree(destination)
    os.replace(folder, destination)
    _flush(destination.parent)


def move_files(folder: Path, destination: Path) -> None:
    """Move the files of ``folder`` to ``destination`` one by one. Each file is replaced atomically."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        _flush(path)
        os.replace(path, destination / path.name)
    _flush(destination)
    shutil.rmtree(folder)


def keep_latest(root: Path, count: int) -> None:
    """Remove all but the ``count`` latest complete checkpoints, and all incomplete ones."""
    kept = checkpoints(root)[-count:]
    for path in root.glob("checkpoint-*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + STAGING)
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(aside)
    os.replace(aside, path)


def why_no_space(folder: Path, needed: int) -> str | None:
    """Why ``needed`` bytes do not fit on the disk of ``folder``, or None if they do."""
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free >= needed:
        return None
    return f"checkpoints will take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there"


def _flush(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk. Systems that cannot open folders do not need to."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

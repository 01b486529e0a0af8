"""What takes long to compile is kept on disk, under a name that changes with all that it was made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock


def longest_first(sources: Iterable[Path]) -> list[Path]:
    """What takes longest to compile comes first, so that no processor waits for the last."""
    return sorted(sources, key=lambda source: source.stat().st_size, reverse=True)


def made_once(of: Iterable[str | bytes], make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` filled, by one process for all. ``of``: what decides the contents."""
    parts = (part.encode() if isinstance(part, str) else part for part in of)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    above = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "focalnet", "static")
    folder = above / digest
    if folder.is_dir():
        return folder
    above.mkdir(parents=True, exist_ok=True)
    with FileLock(above / f"{digest}.lock"):
        if not folder.is_dir():
            fresh = Path(tempfile.mkdtemp(dir=above))
            try:
                make(fresh)
                fresh.rename(folder)
            except BaseException:
                shutil.rmtree(fresh)
                raise
    return folder

"""What takes long to compile is kept on disk, under a name that changes with all that it was made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def made_once(of: Iterable[str | bytes], make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` filled. ``of``: texts and options that decide what comes out."""
    digest = hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in of)).hexdigest()[
        :24
    ]
    above = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "focalnet", "static")
    folder = above / digest
    if not folder.is_dir():
        above.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=above))
        make(fresh)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return folder

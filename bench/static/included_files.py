"""The files that a C++ source includes, with quotes, directly or through others."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@functools.cache
def _direct(path: Path) -> tuple[Path, ...]:
    found = (path.parent / name for name in _INCLUDE.findall(path.read_text()))
    return tuple(one for one in found if one.exists())


def with_included(paths: Iterable[Path]) -> list[Path]:
    """``paths`` and all that they include, each once, in the order of their names."""
    found: set[Path] = set()
    todo = list(paths)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _direct(path)
    return sorted(found)


def digest(paths: Iterable[Path]) -> str:
    """Changes with the names and the texts of ``paths`` and of what they include."""
    parts = (part for path in with_included(paths) for part in (path.name.encode(), _text(path)))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _text(path: Path) -> bytes:
    return path.read_bytes()

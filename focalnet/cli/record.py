"""Keeps the results of an evaluation in a file, so that an interrupted run can continue.

The file has JSON lines. The first describes the run. Each other line holds the name of an image and the rank of its
correct class among the five most probable (from 0; null if it is not among them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from .errors import UserError


class Record:
    """``ranks`` by image name, written to ``path`` as they arrive. Without a path they are kept in memory only.

    Raises:
        UserError: on entering the context, if the file holds the results of a run other than ``run``.
    """

    def __init__(self, path: Path | None, run: dict[str, object]) -> None:
        self._path = path
        self._run = run
        self._file: IO[bytes] | None = None
        self.ranks: dict[str, int | None] = {}

    def __enter__(self) -> Record:
        if self._path is None:
            return self
        whole = _whole_lines(self._path)
        if whole:
            first, *results = whole.decode("utf-8", "replace").splitlines()
            self._check(first)
            self.ranks = dict(map(_parse, results))
        self._file = self._path.open("ab")
        # An interrupted run may have left half a line.
        self._file.truncate(len(whole))
        if not whole:
            self._write([self._run])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, ranks: dict[str, int | None]) -> None:
        self.ranks |= ranks
        self._write([[name, rank] for name, rank in ranks.items()])

    def _write(self, values: list[Any]) -> None:
        if self._file is not None:
            self._file.write("".join(json.dumps(value) + "\n" for value in values).encode())
            self._file.flush()

    def _check(self, line: str) -> None:
        try:
            earlier = json.loads(line)
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError(f"--record {self._path}: not a record of an evaluation; name another file")
        for name, value in self._run.items():
            if earlier.get(name) != value:
                raise UserError(
                    f"--record {self._path}: holds results of {name} {earlier.get(name)}, this run has {value}; "
                    f"name another file, or remove it"
                )


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _parse(line: str) -> tuple[str, int | None]:
    name, rank = json.loads(line)
    return name, rank

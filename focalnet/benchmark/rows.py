"""Stores result rows: one JSON list for each kind of measurement and device, in bench/results/<device>/<kind>.json.

A device is a GPU, identified by name, or a processor, identified by name, family, model, instruction set and cores. A
row holds the case that was measured, the results, and facts about the machine. A new row replaces the old row of the
same case. Rows of which there are thousands are a table instead, <kind>.csv: `read` takes both.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from .environment import ROOT

RESULTS = ROOT / "bench" / "results"
# Stands in for the device if results do not depend on the machine.
NOWHERE = "without-gpu"
# The fields that identify a case. All other fields of a row are results or facts about the machine.
CASE = (
    "case",
    "operator",
    "variant",
    "stage",
    "subject",
    "series",
    "x",
    "size",
    "batch",
    "dtype",
    "runtime",
    "backend",
    "seed",
)


def folder(device: str) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(kind: str, device: str) -> list[dict[str, Any]]:
    path = folder(device) / f"{kind}.json"
    if path.exists():
        return json.loads(path.read_text())
    return _read_table(path.with_suffix(".csv"))


# Columns of a table that hold text even where it looks like a number.
_TEXT = frozenset(("digest", "sources", "triton", "nvcc"))


def write_table(rows: list[dict[str, Any]], kind: str, device: str, fields: tuple[str, ...]) -> Path:
    """Write ``rows``, and none but these, with ``fields`` as columns. Returns the file."""
    path = folder(device) / f"{kind}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        table = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return fresh.replace(path)


def _read_table(path: Path) -> list[dict[str, Any]]:
    """A cell that is empty is no field of its row."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _cell(name, text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _cell(name: str, text: str) -> str | int | float:
    if name in _TEXT or not re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text):
        return text
    return int(text) if text.lstrip("-").isdigit() else float(text)


def devices(kind: str) -> list[str]:
    """The names of all devices with rows of this kind."""
    return sorted({row["device"] for path in RESULTS.glob(f"*/{kind}.json") for row in json.loads(path.read_text())})


def processors(kind: str) -> list[str]:
    """The names of all processors with rows of this kind. Only rows of GPUs have a driver."""
    return [device for device in devices(kind) if not any("driver" in row for row in read(kind, device))]


def write(rows: list[dict[str, Any]], kind: str, device: str) -> Path:
    """Merge ``rows`` into the stored rows. Returns the file."""
    merged = {key(row): row for row in [*read(kind, device), *rows]}
    path = folder(device) / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    return path


def keep_only(keys: set[tuple[Any, ...]], kind: str, device: str) -> None:
    """Delete the rows of all cases except ``keys``."""
    rows = [row for row in read(kind, device) if key(row) in keys]
    (folder(device) / f"{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in CASE)

"""Stores result rows: one JSON list for each kind of measurement and device, in bench/results/<device>/<kind>.json.

A device is a GPU, identified by name, or a processor, identified by name, family, model, instruction set and cores. A
row holds the case that was measured, the results, and facts about the machine. A new row replaces the old row of the
same case.
"""

from __future__ import annotations

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
    return json.loads(path.read_text()) if path.exists() else []


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

"""Result rows: one JSON list for each kind of measurement and device, in
bench/results/<device>/<kind>.json. A device is a GPU by its name, or a processor by name, family, model, instruction
sets and cores.

A row has what was measured (its case), the figures, and the facts of the machine. A new row replaces the one of the
same case and leaves the others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .environment import ROOT

RESULTS = ROOT / "bench" / "results"
NOWHERE = "without-gpu"  # in the place of a device, for what no machine changes
# What tells one case from another; everything else in a row is a figure or a fact about the machine.
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
)


def folder(device: str) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(kind: str, device: str) -> list[dict[str, Any]]:
    path = folder(device) / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else []


def devices(kind: str) -> list[str]:
    """The devices that rows of a kind were measured on."""
    return sorted({row["device"] for path in RESULTS.glob(f"*/{kind}.json") for row in json.loads(path.read_text())})


def processors(kind: str) -> list[str]:
    """Those of the devices that are no GPU: a GPU's rows have its driver."""
    return [device for device in devices(kind) if not any("driver" in row for row in read(kind, device))]


def write(rows: list[dict[str, Any]], kind: str, device: str) -> Path:
    """Puts ``rows`` among those that are there; returns the file."""
    merged = {key(row): row for row in [*read(kind, device), *rows]}
    path = folder(device) / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    return path


def keep_only(keys: set[tuple[Any, ...]], kind: str, device: str) -> None:
    """Drops the rows of cases that no longer exist."""
    rows = [row for row in read(kind, device) if key(row) in keys]
    (folder(device) / f"{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in CASE)

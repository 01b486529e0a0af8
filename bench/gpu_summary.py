"""The end of bench/gpu.sh: how its parts ended and what was measured, as a table and as bench/results/<device>.json.

python bench/gpu_summary.py PARTS      (a line for each part: name, exit status, seconds, between tabs)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rows import folder, read

from focalnet.benchmark.environment import device as device_name
from focalnet.benchmark.environment import facts

KINDS = ("kernels", "models", "training", "scaling")
TIMED_OUT = 124
SECONDS_ALLOWED = 600

console = Console()


def main(
    parts: Annotated[Path, typer.Argument(help="What gpu.sh noted.")],
    device: Annotated[str, typer.Option(help="cuda; cpu to try the script.")] = "cuda",
) -> None:
    """Write the summary, print it, and exit with 1 if a part failed."""
    ended = read_parts(parts)
    name = device_name(device)
    document = {"environment": facts(device), "parts": ended, "rows": {kind: read(kind, name) for kind in KINDS}}
    path = folder(name).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(table(ended, document["rows"]))
    console.print(f"written: {path}")
    if any(part["status"] != "passed" for part in ended):
        raise typer.Exit(1)


def read_parts(path: Path) -> list[dict]:
    """Name, outcome and seconds of every part."""
    found = []
    for line in path.read_text().splitlines():
        name, status, seconds = line.split("\t")
        outcome = {0: "passed", TIMED_OUT: "out of time"}.get(int(status), f"failed ({status})")
        found.append({"part": name, "status": outcome, "seconds": int(seconds)})
    return found


def table(parts: list[dict], rows: dict[str, list[dict]]) -> Table:
    shown = Table(title=f"{sum(part['seconds'] for part in parts)} s of {SECONDS_ALLOWED}")
    for column in ("part", "outcome", "seconds", "rows"):
        shown.add_column(column)
    for part in parts:
        count = len(rows.get(part["part"], ()))
        shown.add_row(part["part"], part["status"], str(part["seconds"]), str(count or ""))
    return shown


if __name__ == "__main__":
    typer.run(main)

"""The summary of bench/gpu.sh, as a table and as bench/results/<device>.json: the state of each part, and the results.

python bench/gpu/gpu_summary.py PARTS      (a JSON list of `deadline.Ended`)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import device as device_name
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import folder, read

KINDS = ("kernels", "numbers", "sweep", "models", "training")

console = Console()


def main(
    parts: Annotated[Path, typer.Argument(help="How the parts ended.")],
    seconds: Annotated[float, typer.Option(help="What all of it took.")] = 0,
    of: Annotated[float, typer.Option(help="What it may take.")] = 0,
    device: Annotated[str, typer.Option(help="cuda; cpu to try the script.")] = "cuda",
) -> None:
    """Write the summary and print it."""
    ended = json.loads(parts.read_text())
    name = device_name(device)
    document = {"environment": facts(device), "parts": ended, "rows": {kind: read(kind, name) for kind in KINDS}}
    path = folder(name).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written: {path}")
    console.print(table(ended, document["rows"], f"{name}: {seconds:.0f} s of {of:.0f}"))


def table(parts: list[dict], rows: dict[str, list[dict]], title: str) -> Table:
    shown = Table(title=title)
    for column in ("part", "outcome", "seconds", "allowed", "rows"):
        shown.add_column(column)
    for part in parts:
        count = len(rows.get(part["part"], ()))
        shown.add_row(
            part["part"], part["status"], f"{part['seconds']:.0f}", f"{part['allowed']:.0f}", str(count or "")
        )
    return shown


if __name__ == "__main__":
    typer.run(main)

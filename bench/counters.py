"""Counts that do not depend on the machine: operators called, and bytes moved and saved for backward per image.

    python bench/counters.py [--variant tiny_lrf --size 224 --batch 8]

Counts an eager float32 FocalNet in focalnet, in transformers, and in timm if it is installed. The bytes moved are all
inputs and outputs of operators, including weights. The rows go to bench/results/without-gpu/counters.json. Takes
seconds.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.counters import COUNTED, counted
from focalnet.benchmark.environment import commit, versions
from focalnet.benchmark.rows import NOWHERE, write
from focalnet.benchmark.runtimes import Case

console = Console()


def main(
    variant: Annotated[str, typer.Option(help="Name of a published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 8,
) -> None:
    """Count, print the table, and write the rows."""
    rows = counted_rows(Case(variant, size, batch))
    console.print(table(rows))
    facts = {"commit": commit(), **versions()}
    write([row | facts for row in rows], "counters", NOWHERE)


def counted_rows(case: Case) -> list[dict]:
    """A row for each model of `COUNTED`. Prints which ones are left out because a package is missing."""
    rows = []
    for name in COUNTED:
        try:
            figures = counted(name, case)
        except ModuleNotFoundError as error:
            console.print(f"left out: {name}: {error.name} is not installed", style="yellow")
            continue
        which = {"variant": case.variant, "size": case.size, "batch": case.batch, "dtype": case.dtype}
        rows.append({"case": "counters", **which, "runtime": name, **figures})
    return rows


def table(rows: list[dict]) -> Table:
    first = rows[0]
    shown = Table(title=f"{first['variant']}, {first['size']} x {first['size']}, batch {first['batch']}, per image")
    shown.add_column("runtime", no_wrap=True)
    for name in ("operators", "MB moved", "MB saved for backward"):
        shown.add_column(name, justify="right")
    for row in rows:
        moved, saved = row["bytes_per_image"] / 1e6, row["saved_bytes_per_image"] / 1e6
        shown.add_row(row["runtime"], str(row["operators"]), f"{moved:.1f}", f"{saved:.1f}")
    return shown


if __name__ == "__main__":
    typer.run(main)

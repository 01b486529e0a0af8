"""Checks whether two runs of a benchmark agree: compares every ratio of one run with the same ratio of the other.

    python bench/models.py --standard && cp bench/results/<device>/models.json first.json
    python bench/models.py --standard --compare-with first.json
    python bench/compare.py first.json bench/results/<device>/models.json

The exit code is 1 if a ratio differs by more than 10 percent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.rows import key

ALLOWED = 0.10

console = Console()


@dataclass(frozen=True)
class Pair:
    """The same ratio in two runs."""

    case: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        """The relative difference: the larger ratio over the smaller, minus 1."""
        return max(self.before, self.after) / min(self.before, self.after) - 1


def main(
    before: Annotated[Path, typer.Argument(help="Rows of the first run.")],
    after: Annotated[Path, typer.Argument(help="Rows of the second run.")],
    allowed: Annotated[float, typer.Option(help="Largest relative difference that passes.")] = ALLOWED,
) -> None:
    """Print every ratio of both, the largest difference, and exit with 1 if it is too large."""
    if not agree(json.loads(before.read_text()), json.loads(after.read_text()), allowed):
        raise typer.Exit(1)


def agree(before: list[dict], after: list[dict], allowed: float = ALLOWED) -> bool:
    """Print the comparison and return whether the runs agree. Runs without a common ratio do not agree."""
    found = pairs(before, after)
    if not found:
        console.print("no ratio is in both", style="red")
        return False
    console.print(table(found))
    largest = max(found, key=lambda pair: pair.difference)
    fine = largest.difference <= allowed
    console.print(
        f"{len(found)} ratios; the largest difference is {largest.difference:.1%} ({largest.case}), "
        f"{'within' if fine else 'beyond'} {allowed:.0%}",
        style="green" if fine else "red",
    )
    return fine


def pairs(before: list[dict], after: list[dict]) -> list[Pair]:
    """The ratios that are in both runs, to the same base runtime. The base's own ratio is left out."""
    earlier = {(key(row), row["ratio_to"]): row["ratio"] for row in before if "ratio" in row}
    return [
        Pair(name_of(row), earlier[key(row), row["ratio_to"]], row["ratio"])
        for row in after
        if row.get("ratio_to") != row["runtime"] and (key(row), row.get("ratio_to")) in earlier
    ]


def name_of(row: dict) -> str:
    return ", ".join(str(value) for value in key(row) if value is not None)


def table(found: list[Pair]) -> Table:
    shown = Table()
    shown.add_column("ratio", overflow="fold")
    for name in ("before", "after", "difference"):
        shown.add_column(name, justify="right", no_wrap=True)
    for pair in found:
        shown.add_row(pair.case, f"{pair.before:.2f}", f"{pair.after:.2f}", f"{pair.difference:.1%}")
    return shown


if __name__ == "__main__":
    typer.run(main)

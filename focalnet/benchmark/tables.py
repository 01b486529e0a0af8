"""Formats result rows as tables for a terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.table import Table

from .runtimes import Case


def of_runtimes(case: Case, rows: list[dict[str, Any]]) -> Table:
    """A table with a row per runtime: median time, and the ratio of times per round with its standard error."""
    what = f"{case.variant}, {case.size} x {case.size}, batch {case.batch}, {case.dtype}, {rows[0]['case']}"
    table = Table(title=what, title_justify="left", title_style="bold")
    table.add_column("runtime", no_wrap=True)
    has_model = rows[0].get("model_memory_bytes") is not None
    columns = ["ms", "fastest", f"over {rows[0]['ratio_to']}", "images/s", "memory MB"]
    columns += ["of it the model's"] if has_model else []
    has_peak = "fma_peak" in rows[0]
    for name in [*columns, *(["of FMA peak"] if has_peak else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["runtime"],
            _ms(row["median_s"]),
            _ms(row["fastest_s"]),
            f"{row['ratio']:.2f} ± {row['ratio'] * row['ratio_error']:.2f}",
            f"{row['batch'] / row['median_s']:.1f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            *([f"{row['model_memory_bytes'] / 1e6:.0f}"] if has_model else []),
            *([f"{row['flops'] / row['median_s'] / row['fma_peak']:.0%}"] if has_peak else []),
        )
    return table


def of_operators(rows: list[dict[str, Any]]) -> Table:
    """A table with a row per stage and direction, and a column per backend. The last backend is the reference."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    first = rows[0]
    kernels = ", ".join(map(str, first["kernels"]))
    title = f"{first['operator']}, kernels {kernels}, batch {first['batch']}, {first['dtype']}: median ms"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("H x W x C", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column(f"{names[-1]} over {names[0]}", justify="right")
    if "floor_s" in first:
        table.add_column(f"floor over {names[0]}", justify="right")
    for (stage, direction), group in groupby(rows, key=lambda row: (row["stage"], row["case"])):
        of_stage = list(group)
        ours, last = of_stage[0], of_stage[-1]
        ratio = [f"{last['ratio']:.2f}"] if len(names) > 1 else []
        floor = [f"{ours['floor_s'] / ours['median_s']:.0%}"] if "floor_s" in ours else []
        table.add_row(stage, direction, *(_ms(row["median_s"]) for row in of_stage), *ratio, *floor)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.3f}"

"""Tables of docs/performance.md from rows that were measured on GPUs: operators, and single kernels beside the model.

`report.py` writes them. The rows are those of bench/gpu/gpu_launches.py ("launches", by the profiler) and
gpu_kernels.py ("kernel", by events around a call).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import page
import plots
import torch

from focalnet.benchmark import rows
from focalnet.benchmark.floors import OPERATORS, gpu_named, stages, work

MISSING = "Not measured on a GPU yet."
BACKENDS = ("cuda", "triton")
REFERENCES = ("reference, torch.compile", "reference")
# Kernels that take less are left out of the page; the rows have all.
SHORTEST_US = 20
TEXT = ("operator", "backend", "kernel")


def operators() -> str:
    """Each operator at each stage: the floor, our backends, the reference with and without a compiler."""
    tables = _tables(("launches", "kernel"), "microseconds", _operator_table)
    drawn = [device for device in rows.devices("kernels") if plots.has_roofline(device)]
    shown = [f"![Roofline of the stages, {one}](plots/{plots.name_of('roofline', one)})" for one in drawn]
    return "\n\n".join([tables, *shown])


def kernels() -> str:
    """Each longer kernel of focal modulation: measured, predicted, and one over the other."""
    return _tables(("launches",), "kernels, microseconds", _kernel_table)


def _tables(cases: tuple[str, ...], title: str, table: Callable[[list[dict]], str]) -> str:
    parts = []
    for device, (variant, batch, dtype), found in _groups(cases):
        parts.append(f"{device}, {variant}, batch {batch}, {dtype}, {title}:\n\n{table(found)}")
    return "\n\n".join(parts) or MISSING


def _groups(cases: tuple[str, ...]) -> Iterator[tuple[str, tuple, list[dict]]]:
    for device in rows.devices("kernels"):
        read = [row for row in rows.read("kernels", device) if row["case"] in cases and row["operator"] in OPERATORS]
        read.sort(key=_of)
        for key, found in groupby(read, _of):
            yield device, key, list(found)


def _of(row: dict) -> tuple[str, int, str]:
    return row["variant"], row["batch"], row["dtype"]


def _operator_table(found: list[dict]) -> str:
    head = ["stage", "operator", "floor", *BACKENDS, *REFERENCES, "compiled reference over the faster of ours"]
    lines = []
    for stage, operator in sorted({(row["stage"], row["operator"]) for row in found}, key=_order):
        of_call = [row for row in found if (row["stage"], row["operator"]) == (stage, operator)]
        ours = {row["backend"]: row["measured_us"] for row in of_call if row.get("subject") == "all"}
        theirs = {row["runtime"]: 1e6 * row["median_s"] for row in of_call if "median_s" in row}
        compiled = theirs.get(REFERENCES[0])
        ratio = f"{compiled / min(ours.values()):.1f}" if compiled and ours else ""
        cells = [ours.get(name) for name in BACKENDS] + [theirs.get(name) for name in REFERENCES]
        lines.append([str(stage), operator, _shown(_floor(of_call[0])), *map(_shown, cells), ratio])
    return page.table(head, lines, TEXT)


def _floor(row: dict) -> float | None:
    """Microseconds that no implementation can beat; None for a GPU whose data sheet is not known."""
    gpu, dtype = gpu_named(row["device"]), getattr(torch, row["dtype"])
    if gpu is None:
        return None
    return 1e6 * work(row["operator"], stages(row["variant"])[row["stage"] - 1], row["batch"], dtype).seconds(
        gpu, dtype
    )


def _kernel_table(found: list[dict]) -> str:
    head = ["stage", "operator", "backend", "kernel", "measured", "predicted", "measured over predicted"]
    predicted = [row for row in found if "predicted_us" in row and row["subject"] != "all"]
    mine = [row for row in predicted if row["operator"].startswith("focal_modulation")]
    mine = [row for row in mine if row["measured_us"] >= SHORTEST_US]
    mine.sort(key=lambda row: (*_order((row["stage"], row["operator"])), row["backend"]))
    return page.table(head, [_kernel_line(row) for row in mine], TEXT)


def _kernel_line(row: dict) -> list[str]:
    measured, predicted = row["measured_us"], row["predicted_us"]
    where = [str(row["stage"]), row["operator"], row["backend"], f"`{row['subject']}`"]
    return [*where, _shown(measured), _shown(predicted), f"{measured / predicted:.2f}"]


def _order(call: tuple[int, str]) -> tuple[int, int]:
    return OPERATORS.index(call[1]), call[0]


def _shown(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:.0f}"

"""Tables of docs/performance.md from rows that were measured on GPUs: operators, and single kernels beside the model.

`report.py` writes them. The rows are those of bench/gpu/gpu_kernels.py ("kernel") and gpu_launches.py ("launches").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import plots

from focalnet.benchmark import rows

MISSING = "Not measured on a GPU yet."
OURS = ("focalnet, cuda", "focalnet, triton")
RUNTIMES = (*OURS, "reference, torch.compile", "reference")
# Kernels of ours; the others of a launch list are those of PyTorch and its libraries.
KERNEL = "_kernel"
OPERATORS = ("gated_aggregation", "gated_aggregation_bwd", "focal_modulation", "focal_modulation_bwd")


def operators() -> str:
    """Each operator at each stage: the floor, our backends, and the reference with and without torch.compile."""
    tables = _tables("kernel", "operators, microseconds", _operator_table)
    drawn = [device for device in rows.devices("kernels") if plots.has_roofline(device)]
    shown = [f"![Roofline of the stages, {one}](plots/{plots.name_of('roofline', one)})" for one in drawn]
    return "\n\n".join([tables, *shown])


def kernels() -> str:
    """Each kernel of ours: measured, predicted, and how often the prediction fits into the measured time."""
    return _tables("launches", "kernels, microseconds", _kernel_table)


def _tables(case: str, title: str, table: Callable[[list[dict]], str]) -> str:
    parts = []
    for device, (variant, batch, dtype), found in _groups(case):
        parts.append(f"{device}, {variant}, batch {batch}, {dtype}, {title}:\n\n{table(found)}")
    return "\n\n".join(parts) or MISSING


def _groups(case: str) -> Iterator[tuple[str, tuple, list[dict]]]:
    for device in rows.devices("kernels"):
        found = [row for row in rows.read("kernels", device) if row["case"] == case and row["operator"] in OPERATORS]
        found.sort(key=_of)
        for key, of_key in groupby(found, _of):
            yield device, key, list(of_key)


def _of(row: dict) -> tuple[str, int, str]:
    return row["variant"], row["batch"], row["dtype"]


def _operator_table(found: list[dict]) -> str:
    head = ["stage", "operator", "floor", *RUNTIMES, "compiled reference over the faster of ours"]
    lines = []
    for stage, operator in sorted({(row["stage"], row["operator"]) for row in found}, key=_order):
        of_call = [row for row in found if (row["stage"], row["operator"]) == (stage, operator)]
        times = {row["runtime"]: row["median_s"] for row in of_call if "median_s" in row}
        floor = next((row["floor_s"] for row in of_call if "floor_s" in row), None)
        fastest = min((times[name] for name in OURS if name in times), default=None)
        compiled = times.get("reference, torch.compile")
        ratio = f"{compiled / fastest:.2f}" if compiled and fastest else ""
        cells = [_microseconds(times.get(name)) for name in RUNTIMES]
        lines.append([str(stage), operator, _microseconds(floor), *cells, ratio])
    return _markdown(head, lines)


def _kernel_table(found: list[dict]) -> str:
    head = ["stage", "operator", "backend", "kernel", "measured", "predicted", "measured over predicted"]
    mine = [row for row in found if row["subject"].endswith(KERNEL) and "predicted_us" in row]
    mine.sort(key=lambda row: (*_order((row["stage"], row["operator"])), row["backend"]))
    return _markdown(head, [_kernel_line(row) for row in mine])


def _kernel_line(row: dict) -> list[str]:
    measured, predicted = row["measured_us"], row["predicted_us"]
    where = [str(row["stage"]), row["operator"], row["backend"], f"`{row['subject']}`"]
    return [*where, f"{measured:.0f}", f"{predicted:.0f}", f"{measured / predicted:.2f}"]


def _order(call: tuple[int, str]) -> tuple[int, int]:
    return OPERATORS.index(call[1]), call[0]


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.0f}"


def _markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---:" if name not in ("operator", "backend", "kernel") else "---" for name in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])

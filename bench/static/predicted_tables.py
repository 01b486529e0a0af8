"""A table of docs/performance.md from the predicted rows: focal modulation on each GPU. `make report` writes it."""

from __future__ import annotations

import page
from backend_order import call_of, committed, microseconds
from predicted_calls import DEVICES, NOTHING

from focalnet.benchmark.floors import stages

VARIANT, DTYPE, BATCH = "tiny_lrf", "bfloat16", 128
DIRECTIONS = {"forward": "focal_modulation", "backward": "focal_modulation_bwd"}
BACKENDS = ("cuda", "triton")
LEAST = {"compiled reference, at least": "inductor_least_us", "floor": "floor_us"}


def of_gpus() -> str:
    """Both backends, the least that a compiled reference takes, and the floor; a blank where no row is yet."""
    rows = committed()
    if not rows:
        return NOTHING
    times = microseconds(rows)
    least = {call_of(row): row for row in rows if row["subject"] == "all" and "floor_us" in row}
    head = ["GPU", "stage", *(f"{direction}: {name}" for direction in DIRECTIONS for name in (*BACKENDS, *LEAST))]
    lines = []
    for device in DEVICES:
        for stage in range(1, len(stages(VARIANT)) + 1):
            calls = [(device, DTYPE, operator, VARIANT, stage, BATCH) for operator in DIRECTIONS.values()]
            cells = []
            for call in calls:
                cells += [times.get(call, {}).get(name) for name in BACKENDS]
                cells += [least.get(call, {}).get(field) for field in LEAST.values()]
            lines.append([device, str(stage), *("" if cell is None else f"{cell:.0f}" for cell in cells)])
    return page.table(head, lines)

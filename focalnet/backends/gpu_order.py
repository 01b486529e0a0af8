"""The order of the backends on a GPU where none was asked for: what was measured here, else what is predicted.

`focalnet tune` measures (see `tuned`). `FIRST` is predicted, not measured: bench/static/backend_order.py writes it
from the rows of bench/static/performance_model.py and cuda_model.py.
"""

from __future__ import annotations

import bisect
import functools

import torch

from . import tuned
from .problem import Problem

DEFAULT = ("triton", "cuda", "reference")

# The GPU whose predictions stand for a compute capability: that of the last row which is not above the device's.
DEVICES = (
    ((8, 0), "A100"),
    ((8, 6), "RTX 4090"),
    ((9, 0), "H100"),
    ((10, 0), "B200"),
    ((12, 0), "RTX 4090"),
)

# GPU, dtype, operator -> the backend that comes first. Four groups: maps whose larger side is at most 8, 16, 32, and
# larger ones. Three letters in each: at most 4 images, at most 32, and more. A dot was not predicted: `DEFAULT` holds.
LARGEST_SIDES, LARGEST_BATCHES = (8, 16, 32), (4, 32)
BACKENDS = {"T": "triton", "C": "cuda", ".": DEFAULT[0]}
# -- written by bench/static/backend_order.py
FIRST: dict[tuple[str | None, str, str], str] = {
    ("A100", "bfloat16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("A100", "bfloat16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("A100", "bfloat16", "focal_modulation"): "CCC CCC CCC CCC",
    ("A100", "bfloat16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("A100", "float16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("A100", "float16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("A100", "float16", "focal_modulation"): "CCC CCC CCC CCC",
    ("A100", "float16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("A100", "float32", "gated_aggregation"): "TTT TTT CCC CTT",
    ("A100", "float32", "gated_aggregation_bwd"): "CTT CCC CCC CCT",
    ("A100", "float32", "focal_modulation"): "CCC CCC CCC CCC",
    ("A100", "float32", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("RTX 4090", "bfloat16", "gated_aggregation"): "TCC CCC CCC CCC",
    ("RTX 4090", "bfloat16", "gated_aggregation_bwd"): "TTT CCT CCT CCC",
    ("RTX 4090", "bfloat16", "focal_modulation"): "CCC CCC CCC CCC",
    ("RTX 4090", "bfloat16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("RTX 4090", "float16", "gated_aggregation"): "TCC CCC CCC CCC",
    ("RTX 4090", "float16", "gated_aggregation_bwd"): "TTT CCT CCT CCC",
    ("RTX 4090", "float16", "focal_modulation"): "CCC CCC CCC CCC",
    ("RTX 4090", "float16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("RTX 4090", "float32", "gated_aggregation"): "TTT TTT CCC TTT",
    ("RTX 4090", "float32", "gated_aggregation_bwd"): "TTT CCC CTT CTT",
    ("RTX 4090", "float32", "focal_modulation"): "CCC CCC CCC CCC",
    ("RTX 4090", "float32", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("H100", "bfloat16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("H100", "bfloat16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("H100", "bfloat16", "focal_modulation"): "CCC CCC CCC CCC",
    ("H100", "bfloat16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("H100", "float16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("H100", "float16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("H100", "float16", "focal_modulation"): "CCC CCC CCC CCC",
    ("H100", "float16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("H100", "float32", "gated_aggregation"): "TTT TTT CCT CTT",
    ("H100", "float32", "gated_aggregation_bwd"): "TTT CCT CCC CCT",
    ("H100", "float32", "focal_modulation"): "CCC CCC CCC CCC",
    ("H100", "float32", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("B200", "bfloat16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("B200", "bfloat16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("B200", "bfloat16", "focal_modulation"): "CCC CCC CCC CCC",
    ("B200", "bfloat16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("B200", "float16", "gated_aggregation"): "CCC CCC CCC CCC",
    ("B200", "float16", "gated_aggregation_bwd"): "CCC CCC CCC CCC",
    ("B200", "float16", "focal_modulation"): "CCC CCC CCC CCC",
    ("B200", "float16", "focal_modulation_bwd"): "CCC CCC CCC CCC",
    ("B200", "float32", "gated_aggregation"): "TTT TTT CTT CTT",
    ("B200", "float32", "gated_aggregation_bwd"): "CTT CCT CCC CCC",
    ("B200", "float32", "focal_modulation"): "CCC CCC CCC CCC",
    ("B200", "float32", "focal_modulation_bwd"): "CCC CCC CCC CCC",
}
# -- end


def order(problem: Problem) -> tuple[str, ...]:
    """The backends in the order in which they are asked, for a problem on a GPU."""
    measured = tuned.choice(problem)
    first = _predicted(problem) if measured is None else measured.backend
    return (first, *(name for name in DEFAULT if name != first))


@functools.lru_cache(4096)
def _predicted(problem: Problem) -> str:
    device, dtype = device_class(_capability(problem.device)), str(problem.dtype).removeprefix("torch.")
    return first(device, dtype, problem.operator, max(problem.height, problem.width), problem.batch)


def first(device: str | None, dtype: str, operator: str, side: int, batch: int) -> str:
    """What the table says."""
    grid = FIRST.get((device, dtype, operator))
    if grid is None:
        return DEFAULT[0]
    return BACKENDS[grid.split()[bisect.bisect_left(LARGEST_SIDES, side)][bisect.bisect_left(LARGEST_BATCHES, batch)]]


def device_class(capability: tuple[int, int] | None) -> str | None:
    """The name of the GPU whose predictions stand for this compute capability; None if there is none."""
    if capability is None:
        return None
    return next((name for least, name in reversed(DEVICES) if least <= capability), None)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None

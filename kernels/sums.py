"""Sums of float32 partials: one writer each, added up in a fixed order."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .plan import Launch
from .tiles import rounded

SUM_BLOCK = 256


@triton.jit(do_not_specialize=["parts", "elements", "first_unit", "unit"])
def sum_partials_kernel(partial, out, parts, elements, first_unit, unit, BLOCK: tl.constexpr):
    """out, from unit first_unit on, = the sum over parts of partial [parts, elements]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    source = partial + at
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(source, mask=inside, other=0.0)
        source += elements
    target = out + first_unit.to(tl.int64) * unit + at
    tl.store(target, rounded(acc, out.dtype.element_ty), mask=inside)


def sum_partials_launch(
    partial: str, out: str, parts: int, elements: int, first_unit: int = 0, unit: int = 0
) -> Launch:
    return Launch(
        sum_partials_kernel,
        (math.ceil(elements / SUM_BLOCK), 1, 1),
        {
            "partial": partial,
            "out": out,
            "parts": parts,
            "elements": elements,
            "first_unit": first_unit,
            "unit": unit,
        },
        {"BLOCK": SUM_BLOCK},
        num_warps=4,
    )

"""Sums of float32 partials [parts, elements], each written by one program, in a fixed order.

program p            owns BLOCK elements of the result
reads once           its elements of every part, PARTS of them at a time; 4 * parts bytes an element
writes once          the sums, in the dtype of the result
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .plan import Launch
from .tiles import rounded

SUM_BLOCK = 256


@triton.jit(do_not_specialize=["parts", "elements", "first_row", "pitch"])
def sum_partials_kernel(
    partial, out, parts, elements, first_row, pitch, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """out, from row first_row on, = the sum over parts of partial [parts, elements], PARTS of them at a time.

    A row of out has COLUMNS elements, and the next one begins ``pitch`` elements further on; COLUMNS 0: one row.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    acc = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        source = partial + part.to(tl.int64)[:, None] * elements + at[None, :]
        acc += tl.load(source, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    if COLUMNS == 0:
        target = out + at
    else:
        target = out + (first_row + at // COLUMNS) * pitch + at % COLUMNS
    tl.store(target, rounded(tl.sum(acc, axis=0), out.dtype.element_ty), mask=inside)


def sum_partials_launch(
    partial: str, out: str, parts: int, elements: int, first_row: int = 0, columns: int = 0, pitch: int = 0
) -> Launch:
    # db has many parts of few elements, dgates few parts of many: both shapes keep 4096 loads in flight.
    together, block = (128, 32) if parts > 64 else (8, 512)
    return Launch(
        sum_partials_kernel,
        (math.ceil(elements / block), 1, 1),
        {
            "partial": partial,
            "out": out,
            "parts": parts,
            "elements": elements,
            "first_row": first_row,
            "pitch": pitch,
        },
        {"COLUMNS": columns, "PARTS": together, "BLOCK": block},
        num_warps=4,
    )

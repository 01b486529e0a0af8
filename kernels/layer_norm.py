"""Backward of a LayerNorm of which only the input was saved:

    dhidden_state, dweight, dbias   from dnormed and hidden_state
    normed = norm(hidden_state)     once more: the linear layer behind needs it for the gradient of its weight

    dnormed       ->|                                     |-> dhidden_state
    hidden_state  ->| one program: rows of C channels     |-> normed

Reads two tensors [rows, C] and writes two. PyTorch's operators make 7 passes: normed again (2), the gradient of the
input (3), those of weight and bias in a kernel of their own (2). Forward has no kernel here, since PyTorch's reads and
writes once too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import Device, Plan
from .rows import (
    RowsCase,
    load_rows,
    load_vector,
    normalised,
    normalised_bwd,
    plan_rows,
    rows_of_tile,
    store_rows,
    store_sum,
)
from .tiles import rounded


@triton.jit(do_not_specialize=["row_count"])
def layer_norm_bwd_kernel(
    dnormed,
    hidden_state,
    weight,
    bias,
    dhidden_state,
    normed,
    partials,
    row_count,
    eps,
    NEED_HIDDEN: tl.constexpr,
    NEED_NORMED: tl.constexpr,
    SUMS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials [programs, SUMS, C]: of dweight and dbias."""
    columns = tl.arange(0, BLOCK_C)
    w, b = load_vector(weight, columns, C), load_vector(bias, columns, C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        rows, inside = rows_of_tile(tile, columns, row_count, C, ROWS)
        xhat, rstd = normalised(load_rows(hidden_state, rows, columns, inside, C), inside, eps, C)
        gradient = load_rows(dnormed, rows, columns, inside, C)
        if SUMS > 0:
            dweight += gradient * xhat
            dbias += gradient
        if NEED_HIDDEN:
            before = normalised_bwd(gradient * w, xhat, rstd, C)
            store_rows(dhidden_state, rows, columns, inside, rounded(before, dhidden_state.dtype.element_ty), C)
        if NEED_NORMED:
            store_rows(normed, rows, columns, inside, rounded(xhat * w + b, normed.dtype.element_ty), C)
    if SUMS > 0:
        store_sum(partials, 0, dweight, columns, SUMS, C)
        store_sum(partials, 1, dbias, columns, SUMS, C)


def backward_plan(case: RowsCase, device: Device) -> Plan:
    """Operands dnormed, hidden_state, weight, bias; outputs [dhidden_state] [, normed] [, sums]."""
    flags = {
        "NEED_HIDDEN": "dhidden_state" in case.outputs,
        "NEED_NORMED": "normed" in case.outputs,
        "SUMS": case.sums,
    }
    return plan_rows(layer_norm_bwd_kernel, case, device, case.numbers("row_count", "eps"), flags, backward=True)

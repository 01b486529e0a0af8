"""The end of a residual branch and the LayerNorm that follows it:

    out = hidden_state + kept / keep * gamma * update
    normed = norm(out)

    hidden_state  ->|                                     |-> out      (layer scale, stochastic depth, sum)
    update        ->| one program: rows of C channels     |-> normed   (of the row in registers)

Forward reads two tensors [rows, C] and writes two. Backward reads dout, dnormed and out, and update if there is a
gamma; it writes dhidden_state, and dupdate if that differs. normed and its statistics are not saved but computed again
from out. PyTorch's operators one by one, in training without layer scale, make 9 passes over a tensor forward and 14
backward, where these make 4 and 5.

`composed` in focalnet/operators/residual_norm.py is the specification.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import Device, Plan
from .rows import (
    RowsCase,
    branch_scale,
    layer_scale,
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


@triton.jit(do_not_specialize=["row_count", "positions"])
def residual_norm_fwd_kernel(
    hidden_state,
    update,
    gamma,
    kept,
    weight,
    bias,
    out,
    normed,
    row_count,
    positions,
    keep,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_C)
    scale = layer_scale(gamma, columns, C, HAS_GAMMA)
    w, b = load_vector(weight, columns, C), load_vector(bias, columns, C)
    for tile in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        rows, inside = rows_of_tile(tile, columns, row_count, C, ROWS)
        before = load_rows(hidden_state, rows, columns, inside, C)
        branch = load_rows(update, rows, columns, inside, C)
        after = before + branch * branch_scale(scale, kept, rows, row_count, positions, keep, HAS_KEPT)
        # Normed as it is written, rounded: backward computes the statistics from that.
        after = rounded(after, out.dtype.element_ty)
        store_rows(out, rows, columns, inside, after, C)
        xhat, _ = normalised(after.to(tl.float32), inside, eps, C)
        store_rows(normed, rows, columns, inside, rounded(xhat * w + b, normed.dtype.element_ty), C)


@triton.jit(do_not_specialize=["row_count", "positions"])
def residual_norm_bwd_kernel(
    dout,
    dnormed,
    out,
    update,
    gamma,
    kept,
    weight,
    dhidden_state,
    dupdate,
    partials,
    row_count,
    positions,
    keep,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_UPDATE: tl.constexpr,
    SUMS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials [programs, SUMS, C]: of dweight, dbias and, with a gamma, of dgamma."""
    columns = tl.arange(0, BLOCK_C)
    one = tl.full((1, BLOCK_C), 1.0, tl.float32)
    scale = layer_scale(gamma, columns, C, HAS_GAMMA)
    w = load_vector(weight, columns, C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dgamma = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        rows, inside = rows_of_tile(tile, columns, row_count, C, ROWS)
        behind = load_rows(dnormed, rows, columns, inside, C)
        xhat, rstd = normalised(load_rows(out, rows, columns, inside, C), inside, eps, C)
        if SUMS > 0:
            dweight += behind * xhat
            dbias += behind
        gradient = load_rows(dout, rows, columns, inside, C) + normalised_bwd(behind * w, xhat, rstd, C)
        if NEED_HIDDEN:
            store_rows(dhidden_state, rows, columns, inside, rounded(gradient, dhidden_state.dtype.element_ty), C)
        gradient = gradient * branch_scale(one, kept, rows, row_count, positions, keep, HAS_KEPT)
        if SUMS == 3:
            dgamma += gradient * load_rows(update, rows, columns, inside, C)
        if NEED_UPDATE:
            store_rows(dupdate, rows, columns, inside, rounded(gradient * scale, dupdate.dtype.element_ty), C)
    if SUMS > 0:
        store_sum(partials, 0, dweight, columns, SUMS, C)
        store_sum(partials, 1, dbias, columns, SUMS, C)
    if SUMS == 3:
        store_sum(partials, 2, dgamma, columns, SUMS, C)


def _flags(case: RowsCase) -> dict[str, bool]:
    return {"HAS_GAMMA": "gamma" in case.operands, "HAS_KEPT": "kept" in case.operands}


def forward_plan(case: RowsCase, device: Device) -> Plan:
    """Operands hidden_state, update, weight, bias [, gamma] [, kept]; outputs out, normed."""
    numbers = case.numbers("row_count", "positions", "keep", "eps")
    return plan_rows(residual_norm_fwd_kernel, case, device, numbers, _flags(case))


def backward_plan(case: RowsCase, device: Device) -> Plan:
    """Operands dout, dnormed, out, weight [, update, gamma] [, kept]; outputs [dhidden_state] [, dupdate] [, sums]."""
    numbers = case.numbers("row_count", "positions", "keep", "eps")
    needs = {"NEED_HIDDEN": "dhidden_state" in case.outputs, "NEED_UPDATE": "dupdate" in case.outputs}
    flags = _flags(case) | needs | {"SUMS": case.sums}
    return plan_rows(residual_norm_bwd_kernel, case, device, numbers, flags, backward=True)

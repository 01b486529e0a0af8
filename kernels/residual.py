"""The end of a residual branch, with the LayerNorm behind the branch if there is one:

    out = hidden_state + kept / keep * gamma * norm(update)

    hidden_state  ->|                                     |-> out
    update        ->| one program: rows of C channels     |           (norm, layer scale, stochastic depth, sum)

Forward reads two tensors [rows, C] and writes one. Backward reads dout, and update where a norm or gamma needs it, and
writes dupdate; the gradient of hidden_state is dout itself. PyTorch's operators one by one, in training with all of
them, make 11 passes over a tensor forward and 15 backward, where these make 3 and 3.

`composed` in focalnet/operators/residual.py is the specification.
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
def residual_fwd_kernel(
    hidden_state,
    update,
    gamma,
    kept,
    weight,
    bias,
    out,
    row_count,
    positions,
    keep,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_C)
    scale = layer_scale(gamma, columns, C, HAS_GAMMA)
    if HAS_NORM:
        w, b = load_vector(weight, columns, C), load_vector(bias, columns, C)
    for tile in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        rows, inside = rows_of_tile(tile, columns, row_count, C, ROWS)
        before = load_rows(hidden_state, rows, columns, inside, C)
        branch = load_rows(update, rows, columns, inside, C)
        if HAS_NORM:
            xhat, _ = normalised(branch, inside, eps, C)
            branch = xhat * w + b
        after = before + branch * branch_scale(scale, kept, rows, row_count, positions, keep, HAS_KEPT)
        store_rows(out, rows, columns, inside, rounded(after, out.dtype.element_ty), C)


@triton.jit(do_not_specialize=["row_count", "positions"])
def residual_bwd_kernel(
    dout,
    update,
    gamma,
    kept,
    weight,
    bias,
    dupdate,
    partials,
    row_count,
    positions,
    keep,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NEED_UPDATE: tl.constexpr,
    SUMS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials [programs, SUMS, C]: of dgamma, and with a norm of dweight and dbias.

    All three follow from two sums: of s dout xhat and of s dout, where s is the row's kept / keep.
    """
    columns = tl.arange(0, BLOCK_C)
    one = tl.full((1, BLOCK_C), 1.0, tl.float32)
    scale = layer_scale(gamma, columns, C, HAS_GAMMA)
    if HAS_NORM:
        w, b = load_vector(weight, columns, C), load_vector(bias, columns, C)
    along_branch = tl.zeros((ROWS, BLOCK_C), tl.float32)
    plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        rows, inside = rows_of_tile(tile, columns, row_count, C, ROWS)
        gradient = load_rows(dout, rows, columns, inside, C)
        gradient = gradient * branch_scale(one, kept, rows, row_count, positions, keep, HAS_KEPT)
        if HAS_NORM:
            branch, rstd = normalised(load_rows(update, rows, columns, inside, C), inside, eps, C)
            plain += gradient
        elif SUMS > 0:
            branch = load_rows(update, rows, columns, inside, C)
        if SUMS > 0:
            along_branch += gradient * branch
        if NEED_UPDATE:
            gradient = gradient * scale
            if HAS_NORM:
                gradient = normalised_bwd(gradient * w, branch, rstd, C)
            store_rows(dupdate, rows, columns, inside, rounded(gradient, dupdate.dtype.element_ty), C)
    if SUMS == 1:
        store_sum(partials, 0, along_branch, columns, SUMS, C)
    if SUMS == 3:
        store_sum(partials, 0, along_branch * w + plain * b, columns, SUMS, C)
        store_sum(partials, 1, along_branch * scale, columns, SUMS, C)
        store_sum(partials, 2, plain * scale, columns, SUMS, C)


def _flags(case: RowsCase) -> dict[str, bool]:
    given = case.operands
    return {"HAS_GAMMA": "gamma" in given, "HAS_KEPT": "kept" in given, "HAS_NORM": "weight" in given}


def forward_plan(case: RowsCase, device: Device) -> Plan:
    """Operands hidden_state, update [, gamma] [, kept] [, weight, bias]; output out."""
    numbers = case.numbers("row_count", "positions", "keep", "eps")
    return plan_rows(residual_fwd_kernel, case, device, numbers, _flags(case))


def backward_plan(case: RowsCase, device: Device) -> Plan:
    """Operands dout, update [, gamma] [, kept] [, weight, bias]; outputs [dupdate] [, sums]."""
    numbers = case.numbers("row_count", "positions", "keep", "eps")
    flags = _flags(case) | {"NEED_UPDATE": "dupdate" in case.outputs, "SUMS": case.sums}
    return plan_rows(residual_bwd_kernel, case, device, numbers, flags, backward=True)

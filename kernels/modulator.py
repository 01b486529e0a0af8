"""The modulator's matrix products, forward and backward.

    program p            owns a slab of BLOCK_N channels of the result (slab p % slabs), and with it C x BLOCK_N of W;
                         walks over the tiles of BLOCK_M rows group, group + groups, ... (group p // slabs)
    out   = q * (agg @ W^T + b)               a tile of q read, a tile of out written where one of the product is done
    dq    = dout * (agg @ W^T + b)            alike; dm = dout * q and the slab's share of db ride along, so that q and
                                              dout pass once
    dagg  = dm @ W
    dW    = dm^T @ agg                        a tile of dW and a range of rows a program, float32 partial sums

Bytes: q, out, dout and dq once. agg, dm and dagg belong to a chunk of images and are still in L2 when the product that
reads them runs, once a slab. W once a group; there are as many groups as fill the device. The
compiler sees the walk over tiles and steps of BLOCK_K as one loop (``flatten``), so the first loads of a tile are in
flight while the tile before it is finished. That loop stands in each kernel: no device function can hold a loop whose
body differs.

Sums over rows are float32 partials with one writer each, which a second kernel adds up in a fixed order. The kernels'
parameters: tensors read, tensors written, numbers, then constants (C, what is asked for, precision, the tile).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .launch_table import BACKWARD, FORWARD, ProductConfig, product_config, weight_product_config
from .level_launch import alignment
from .plan import Case, Device, Launch
from .tiles import INTERPRETED, rounded


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right. Of float32 in full precision each step is a sum of its own, then added.

    Multiply-adds are a chain: through all steps the error of a long sum would grow with its length, and be more than
    twice that of a BLAS library. The limit on imprecise sums means nothing to float32; Triton leaves the addition
    outside the step where there is one.
    """
    if PRECISION == "ieee" and left.dtype == tl.float32:
        acc += tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=left.shape[1])
    elif INTERPRETED:  # its tl.dot takes the bits of bfloat16 for integers
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_tile(
    a,
    b,
    rows,
    columns,
    row_count,
    b_k_stride: tl.constexpr,
    b_n_stride: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [row_count, C] @ b [C, C] at some rows and columns, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    in_rows = (rows < row_count)[:, None]
    in_columns = (columns < C)[None, :]
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_tile = a + rows.to(tl.int64)[:, None] * C + k[None, :]
        b_tile = b + k[:, None] * b_k_stride + columns[None, :] * b_n_stride
        if C % BLOCK_K == 0:
            left = tl.load(a_tile, mask=in_rows, other=0.0)
            right = tl.load(b_tile, mask=in_columns, other=0.0)
        else:
            left = tl.load(a_tile, mask=in_rows & (k < C)[None, :], other=0.0)
            right = tl.load(b_tile, mask=in_columns & (k < C)[:, None], other=0.0)
        acc = dot(left, right, acc, PRECISION)
    return acc


@triton.jit
def add_bias(acc, bias, columns, C: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["first_row", "row_count", "q_pitch"])
def modulator_fwd_kernel(
    agg,
    weight,
    bias,
    q,
    out,
    first_row,
    row_count,
    q_pitch,
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """agg [row_count, C]; q and out from first_row on."""
    slabs: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    columns = (tl.program_id(0) % slabs) * BLOCK_N + tl.arange(0, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0) // slabs, tl.cdiv(row_count, BLOCK_M), tl.num_programs(0) // slabs, flatten=True
    ):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = product_tile(agg, weight, rows, columns, row_count, 1, C, C, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        acc = add_bias(acc, bias, columns, C, HAS_BIAS)
        inside = (rows < row_count)[:, None] & (columns < C)[None, :]
        at = (first_row + rows).to(tl.int64)[:, None]
        query = tl.load(q + at * (q_pitch * Q_ALIGN) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at * C + columns[None, :], rounded(query * acc, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "row_count", "q_pitch", "dq_pitch"])
def modulator_bwd_kernel(
    agg,
    weight,
    bias,
    q,
    dout,
    dq,
    dm,
    dbias,
    first_row,
    row_count,
    q_pitch,
    dq_pitch,
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_M: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    Q_ALIGN: tl.constexpr,
    DQ_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq from first_row on; agg and dm [row_count, C] of the chunk.

    dbias [groups, C], float32: sums over a group's rows, added to what earlier chunks left.
    """
    slabs: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // slabs
    columns = (tl.program_id(0) % slabs) * BLOCK_N + tl.arange(0, BLOCK_N)
    if NEED_BIAS:
        sums = dbias + group * C + columns
        total = tl.load(sums, mask=columns < tl.where(first_row > 0, C, 0), other=0.0)
    for tile in tl.range(group, tl.cdiv(row_count, BLOCK_M), tl.num_programs(0) // slabs, flatten=True):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < row_count)[:, None] & (columns < C)[None, :]
        at = (first_row + rows).to(tl.int64)[:, None]
        if NEED_Q:
            acc = product_tile(agg, weight, rows, columns, row_count, 1, C, C, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            acc = add_bias(acc, bias, columns, C, HAS_BIAS)
        gradient = tl.load(dout + at * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if NEED_Q:
            target = dq + at * (dq_pitch * DQ_ALIGN) + columns[None, :]
            tl.store(target, rounded(gradient * acc, dq.dtype.element_ty), mask=inside)
        if NEED_M or NEED_BIAS:
            query = tl.load(q + at * (q_pitch * Q_ALIGN) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            product = gradient * query
            if NEED_M:
                target = dm + rows.to(tl.int64)[:, None] * C + columns[None, :]
                tl.store(target, rounded(product, dm.dtype.element_ty), mask=inside)
            if NEED_BIAS:
                total += tl.sum(product, axis=0)
    if NEED_BIAS:
        tl.store(sums, total, mask=columns < C)


@triton.jit(do_not_specialize=["row_count"])
def dagg_kernel(
    dm,
    weight,
    dagg,
    row_count,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slabs: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    columns = (tl.program_id(0) % slabs) * BLOCK_N + tl.arange(0, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0) // slabs, tl.cdiv(row_count, BLOCK_M), tl.num_programs(0) // slabs, flatten=True
    ):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = product_tile(dm, weight, rows, columns, row_count, C, 1, C, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        inside = (rows < row_count)[:, None] & (columns < C)[None, :]
        target = dagg + rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(target, rounded(acc, dagg.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_count", "rows_per_split"])
def dweight_kernel(
    dm,
    agg,
    partial,
    row_count,
    rows_per_split,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial [splits, C, C], float32: dm^T @ agg over the rows of a split, added to what earlier chunks left."""
    tiles_n: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    out_rows = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    low = split * rows_per_split
    high = tl.minimum(low + rows_per_split, row_count)
    inside = (out_rows < C)[:, None] & (out_columns < C)[None, :]
    target = partial + split.to(tl.int64) * (C * C) + out_rows[:, None] * C + out_columns[None, :]
    acc = tl.load(target, mask=inside, other=0.0)
    for trip in range(tl.cdiv(high - low, BLOCK_K)):
        rows = low + trip * BLOCK_K + tl.arange(0, BLOCK_K)
        start = rows.to(tl.int64) * C
        in_rows = rows < high
        left = tl.load(
            dm + start[None, :] + out_rows[:, None], mask=in_rows[None, :] & (out_rows < C)[:, None], other=0.0
        )
        right = tl.load(
            agg + start[:, None] + out_columns[None, :], mask=in_rows[:, None] & (out_columns < C)[None, :], other=0.0
        )
        acc = dot(left, right, acc, PRECISION)
    tl.store(target, acc, mask=inside)


# ---- launches -------------------------------------------------------------------------------------------------------


def modulator_launch(case: Case, device: Device, first_image: int, images: int, precision: str) -> Launch:
    config = product_config(FORWARD, case.channels, case.dtype, device)
    rows = images * case.positions
    return Launch(
        modulator_fwd_kernel,
        (slabs_of(case, config) * groups_of(case, device, config, rows), 1, 1),
        {
            "agg": "agg",
            "weight": "weight",
            "bias": "bias" if case.has_bias else "weight",
            "q": "q",
            "out": "out",
            "first_row": first_image * case.positions,
            "row_count": rows,
            **q_pitch(case),
        },
        {**product_constexprs(case, config, precision), "HAS_BIAS": case.has_bias, **q_alignment(case)},
        config.num_warps,
        config.num_stages,
    )


def modulator_bwd_launch(
    case: Case, device: Device, groups: int, first_image: int, images: int, need_m: bool, precision: str
) -> Launch:
    config = product_config(BACKWARD, case.channels, case.dtype, device)
    need_q, need_bias = case.mask[0], case.mask[4]
    return Launch(
        modulator_bwd_kernel,
        (slabs_of(case, config) * groups, 1, 1),
        {
            "agg": "agg",
            "weight": "weight",
            "bias": "bias" if case.has_bias else "weight",
            "q": "q",
            "dout": "dout",
            "dq": "dq" if need_q else "agg",
            "dm": "dm" if need_m else "agg",
            "dbias": "dbias_parts" if need_bias else "agg",
            "first_row": first_image * case.positions,
            "row_count": images * case.positions,
            **q_pitch(case),
            "dq_pitch": case.dctx_pitch // alignment(case.dctx_pitch, case.dtype),
        },
        {
            **product_constexprs(case, config, precision),
            "HAS_BIAS": case.has_bias,
            "NEED_Q": need_q,
            "NEED_M": need_m,
            "NEED_BIAS": need_bias,
            **q_alignment(case),
            "DQ_ALIGN": alignment(case.dctx_pitch, case.dtype),
        },
        config.num_warps,
        config.num_stages,
    )


def dagg_launch(case: Case, device: Device, groups: int, images: int, precision: str) -> Launch:
    """dm @ W; agg is not needed any more, dagg takes its place."""
    config = product_config(BACKWARD, case.channels, case.dtype, device)
    return Launch(
        dagg_kernel,
        (slabs_of(case, config) * groups, 1, 1),
        {"dm": "dm", "weight": "weight", "dagg": "agg", "row_count": images * case.positions},
        product_constexprs(case, config, precision),
        config.num_warps,
        config.num_stages,
    )


def dweight_launch(case: Case, images: int, splits: int, precision: str) -> Launch:
    config = weight_product_config(case.channels, case.dtype)
    rows = images * case.positions
    tiles = math.ceil(case.channels / config.block_m) * math.ceil(case.channels / config.block_n)
    return Launch(
        dweight_kernel,
        (tiles, splits, 1),
        {
            "dm": "dm",
            "agg": "agg",
            "partial": "dweight_parts",
            "row_count": rows,
            "rows_per_split": math.ceil(rows / splits),
        },
        product_constexprs(case, config, precision),
        config.num_warps,
        config.num_stages,
    )


def slabs_of(case: Case, config: ProductConfig) -> int:
    return math.ceil(case.channels / config.block_n)


def groups_of(case: Case, device: Device, config: ProductConfig, rows: int) -> int:
    """Groups of programs, one program a slab: as many as fill the device. Each walks over the rows in tiles.

    Of the counts that give the same longest walk, the smallest: every group reads all of W.
    """
    slabs, tiles = slabs_of(case, config), math.ceil(rows / config.block_m)
    groups = max(1, config.programs_per_sm * device.sm_count // slabs)
    walk = math.ceil(tiles / groups)
    return math.ceil(tiles / walk)


def splits_of(case: Case, device: Device, images: int, wanted: int = 0) -> int:
    """Ranges of rows that dW is summed over: ``wanted``, or as many as fill the device, each of at least eight steps.

    Their partial sums take at most a tenth of what stays on chip; more only where a processor would have no program
    otherwise.
    """
    if wanted:
        return wanted
    config = weight_product_config(case.channels, case.dtype)
    tiles = math.ceil(case.channels / config.block_m) * math.ceil(case.channels / config.block_n)
    fitting = device.on_chip_bytes // 10 // (4 * case.channels**2)
    programs = config.programs_per_sm * device.sm_count
    filling = min(programs // tiles, max(fitting, math.ceil(device.sm_count / tiles)))
    return max(1, min(filling, images * case.positions // (8 * config.block_k)))


def q_pitch(case: Case) -> dict[str, int]:
    return {"q_pitch": case.q_pitch // alignment(case.q_pitch, case.dtype)}


def q_alignment(case: Case) -> dict[str, int]:
    return {"Q_ALIGN": alignment(case.q_pitch, case.dtype)}


def product_constexprs(case: Case, config: ProductConfig, precision: str) -> dict[str, object]:
    return {
        "C": case.channels,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }

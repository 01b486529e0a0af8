"""The gradient of the focal weights: dW of one level, and the sum over programs.

    dweight_rows         dW [KH * KW, BLOCK_C] += correlation of dz with the level below, over the rows of a step
    partial              float32, one for each program, in global memory: read and written once a step and column
    sum_focal_weights    dw (C, 1, kh, kw) of a level = the sum over the programs that own a block of channels

Bytes: the rows of dz and of the level below once for every step and column of the kernel, in practice from L1 and L2.
A sum has one writer and one order: nothing is added atomically.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .plan import Case, Launch
from .sums import SUM_BLOCK
from .tiles import Plane, add_products, load_rows, part_size, rounded, rows_of, starts_part, zero_tiles


@triton.jit
def dweight_rows(
    dz,
    below,
    partial,
    row0,
    tiles,
    size,
    DZ_RING: tl.constexpr,
    RING: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial [KH * KW, BLOCK_C] += the correlation of dz with the plane below, over ``tiles`` tiles of rows.

    One column of the kernel at a time: its sums stay in registers, tile after tile, and are summed over columns of the
    map only then. A column of more than nine taps is cut in half: 15 sums and the rows that they meet do not fit.
    """
    TAPS: tl.constexpr = KH if KH <= 9 else (KH + 1) // 2
    for kx in range(KW):
        for first in tl.static_range(0, KH, TAPS):
            dweight_column(
                dz, below, partial + (first * KW + kx) * BLOCK_C, row0, first - KH // 2, kx - KW // 2, tiles, size,
                DZ_RING, RING, min(TAPS, KH - first), KW, ROWS, BLOCK_W, BLOCK_C,
            )  # fmt: skip


@triton.jit
def dweight_column(
    dz,
    below,
    partial,
    row0,
    down,
    right,
    tiles,
    size,
    DZ_RING: tl.constexpr,
    RING: tl.constexpr,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """TAPS taps below one another, of which the first looks ``down`` rows below and ``right`` columns to the right."""
    sums = zero_tiles(TAPS, BLOCK_W, BLOCK_C)
    for tile in range(tiles):
        first_row = row0 + tile * ROWS
        if (first_row < size.height) & (first_row + ROWS > 0):
            for column0 in range(0, size.width, BLOCK_W):
                gradients = load_rows(
                    Plane(dz.start, dz.row_pitch, dz.pixel_pitch, below.in_channels), first_row, column0, size,
                    DZ_RING, ROWS, BLOCK_W, BLOCK_C,
                )  # fmt: skip
                values = ()
                for i in tl.static_range(ROWS + TAPS - 1):
                    if starts_part(i, ROWS + TAPS - 1):
                        values = values + load_rows(
                            below, first_row + down + i, column0 + right, size,
                            RING, part_size(i, ROWS + TAPS - 1), BLOCK_W, BLOCK_C,
                        )  # fmt: skip
                    sums = add_products(sums, gradients, values[i], i, TAPS, ROWS)
    for tap in tl.static_range(TAPS):
        if starts_part(tap, TAPS):
            found = rows_of(sums, tap, part_size(tap, TAPS))
            found = tl.reshape(found, (part_size(tap, TAPS), BLOCK_W, BLOCK_C))
            add_sums(partial + tap * (KW * BLOCK_C), KW * BLOCK_C, found, part_size(tap, TAPS))


@triton.jit
def add_sums(partial, pitch, sums, TAPS: tl.constexpr):
    """partial [TAPS, C], whose rows lie ``pitch`` apart, += the sums (TAPS, W, C) over W."""
    found = tl.sum(sums, axis=1)
    target = partial + (tl.arange(0, TAPS) * pitch)[:, None] + tl.arange(0, found.shape[1])[None, :]
    tl.store(target, tl.load(target) + found)


@triton.jit(do_not_specialize=["workers", "channels", "taps", "tap0", "all_taps", "block_c"])
def sum_focal_weights_kernel(
    dfocal,
    out,
    workers,
    channels,
    taps,
    tap0,
    all_taps,
    block_c,
    BLOCK: tl.constexpr,
):
    """out (C, 1, kh, kw) of one level = the sum of dfocal [workers, blocks, all_taps, block_c] over the workers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, tap = at // taps, at % taps
    source = dfocal + ((channel // block_c) * all_taps + tap0 + tap) * block_c + channel % block_c
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(workers):
        acc += tl.load(source, mask=at < channels * taps, other=0.0)
        source += tl.cdiv(channels, block_c) * all_taps * block_c
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=at < channels * taps)


def sum_focal_weights_launches(case: Case, workers: int, block_c: int) -> list[Launch]:
    """Of every level: dw0 .. from dfocal [workers, blocks, taps, block_c]."""
    launches, tap0 = [], 0
    for level, (kh, kw) in enumerate(case.kernel_sizes):
        launches.append(
            Launch(
                sum_focal_weights_kernel,
                (math.ceil(case.channels * kh * kw / SUM_BLOCK), 1, 1),
                {
                    "dfocal": "dfocal",
                    "out": f"dw{level}",
                    "workers": workers,
                    "channels": case.channels,
                    "taps": kh * kw,
                    "tap0": tap0,
                    "all_taps": case.taps,
                    "block_c": block_c,
                },
                {"BLOCK": SUM_BLOCK},
                num_warps=4,
            )
        )
        tap0 += kh * kw
    return launches

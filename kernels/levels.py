"""Device functions that the aggregation's kernels share, forward and backward: who owns what, and one level of it.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    packed               its focal weights as float32 [taps, BLOCK_C], those of level l from row TAP0[l] on
    rings                its scratch: ctx_1 .., a few rows each; ring l starts at row RING0[l] and keeps RING[l] rows
                         (where WHOLE_PLANE is set, at plane RING0[l], all rows of it)

Tuples of constants hold one entry a level: KH, KW, TAP0, LAG, RING, RING0. A device function takes them whole, with
the LEVEL that it works on.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import Plane, channels_of, conv_tiles, pack_weights, ring_of


class Share(NamedTuple):
    """What a program owns: ``block`` of the channels, ``own`` (BLOCK_C,) from channel0 on, of every workers-th image.

    ``in_channels`` and ``in_ring`` (1, BLOCK_C) mask the channels that a map has, and a ring: all.
    """

    worker: tl.tensor
    workers: tl.tensor
    block: tl.tensor
    channel0: tl.tensor
    in_channels: tl.tensor
    in_ring: tl.tensor
    own: tl.tensor


class Image(NamedTuple):
    """One image at the program's channels: its operands and their pitches, from pixel to pixel, in elements."""

    ctx: tl.tensor
    ctx_pixel: tl.tensor
    gates: tl.tensor
    gates_pixel: tl.tensor
    channels: tl.tensor
    in_channels: tl.tensor


@triton.constexpr_function
def gated_rows(rows, block_c, most):
    """Rows gated at once, of a tile's ``rows``: so few that not every thread has a gate to load."""
    return min(rows, block_c // 8, most)


@triton.jit
def share_of_program(channels, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    workers = tl.num_programs(0) // blocks
    worker = program // blocks
    block = program % blocks
    channel0 = block * BLOCK_C
    in_block = channels_of(BLOCK_C)
    in_channels = channel0 + in_block < channels
    in_ring = in_block < BLOCK_C
    return Share(worker, workers, block, channel0, in_channels, in_ring, channel0 + tl.arange(0, BLOCK_C))


@triton.jit
def rings_of_program(scratch, in_ring, size, KEPT: tl.constexpr, WHOLE_PLANE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's own part of the scratch of all programs: KEPT rows, or planes."""
    ring_row = size.width * BLOCK_C
    rows = KEPT * (size.height if WHOLE_PLANE else 1)
    return Plane(scratch + tl.program_id(0).to(tl.int64) * rows * ring_row, ring_row, BLOCK_C, in_ring)


@triton.jit
def pack_levels(
    packed,
    focal_weights,
    channel0,
    channels,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The weights of every level, for the program itself: it may read them only beyond the barrier."""
    for level in tl.static_range(len(KH)):
        first = packed + TAP0[level] * BLOCK_C
        pack_weights(first, focal_weights[level], channel0, channels, KH[level] * KW[level], 16, BLOCK_C)
    tl.debug_barrier()


@triton.jit
def conv_level(
    image,
    rings,
    packed,
    row0,
    column0,
    size,
    LEVEL: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z of a level, ROWS rows from row0 on: the convolution of ctx, or of what the level below left in its ring."""
    if LEVEL == 0:
        below = Plane(image.ctx, size.width * image.ctx_pixel, image.ctx_pixel, image.in_channels)
        return conv_tiles(below, packed, row0, column0, size, 0, KH[0], KW[0], False, ROWS, BLOCK_W, BLOCK_C)
    else:
        ring = ring_of(rings, RING0[LEVEL - 1], size, WHOLE_PLANE, BLOCK_C)
        weights = packed + TAP0[LEVEL] * BLOCK_C
        # rings.in_channels is the same mask, but one that lives through the whole forward kernel costs it registers.
        below = Plane(ring.start, ring.row_pitch, BLOCK_C, channels_of(BLOCK_C) < BLOCK_C)
        return conv_tiles(
            below, weights, row0, column0, size, RING[LEVEL - 1], KH[LEVEL], KW[LEVEL], False, ROWS, BLOCK_W, BLOCK_C
        )

"""Device functions of the aggregation's backward: one level of one step, upwards and downwards.

    level_up             ctx_l -> z_l; writes ctx_{l+1} and GELU'(z_l) into their rings, dgates_l, and the last level's
                         dz_{L-1} = (dmean + gate_{L-1} * dagg) GELU'(z_{L-1}), for which its slope is never stored
    dweight_level        dz_l, ctx_l -> dW_l
    level_down           dz_l -> dctx_l, and of that dz_{l-1} = (dctx_l + gate_{l-1} * dagg) GELU'(z_{l-1})

Ring L - 1 + l holds GELU'(z_l) until dz_l takes its place, row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .focal_weights import dweight_rows
from .levels import conv_level, gated_rows
from .tiles import (
    Plane,
    channels_of,
    columns_from,
    conv_tiles,
    gelu_and_grad,
    load_gates,
    ring_of,
    rounded,
    row_pointer,
    rows_from,
    rows_of,
    widened,
)

MAX_GATED_ROWS = tl.constexpr(4)


class Gradients(NamedTuple):
    """Where the gradients of one image start, at the program's channels. ``dctx_pixel``: elements from pixel to pixel
    of dctx. ``dmean``: what the gradient of the mean adds at every position of ctx_L."""

    dagg: tl.tensor
    dctx: tl.tensor
    dctx_pixel: tl.tensor
    dgates: tl.tensor
    dmean: tl.tensor


@triton.jit
def global_level_bwd(
    image,
    dagg,
    dgates,
    context,
    size,
    own,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of dagg * gate over the plane, (BLOCK_C,). Stores the gradient of the global gate on its way."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, size.height * size.width, BLOCK_P):
        pixels = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = pixels < size.height * size.width
        source = dagg + pixels[:, None] * image.channels + tl.max_contiguous(tl.arange(0, BLOCK_C), 4)[None, :]
        gradient = widened(tl.load(source, mask=inside[:, None] & (own < image.channels)[None, :], other=0.0))
        gate = tl.load(image.gates + pixels * image.gates_pixel + LEVELS, mask=inside, other=0.0).to(tl.float32)
        total += gradient * gate[:, None]
        if NEED_GATES:
            target = dgates + pixels * (LEVELS + 1) + LEVELS
            tl.store(target, tl.sum(gradient * context[None, :], axis=1) * SCALE, mask=inside)
    return tl.sum(total, axis=0)


@triton.jit
def level_up(
    image,
    gradients,
    rings,
    packed,
    step,
    tiles,
    size,
    LEVEL: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    LAG: tl.constexpr,
    RING: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_DZ: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One level of a step, upwards: stores ctx_{l+1} and GELU'(z_l), or the last level's dz, and dgates_l."""
    GATED_ROWS: tl.constexpr = gated_rows(ROWS, BLOCK_C, MAX_GATED_ROWS)
    for tile in range(tiles):
        row0 = step * STEP + tile * ROWS - LAG[LEVEL]
        if (row0 < size.height) & (row0 + ROWS > 0):
            for column0 in range(0, size.width, BLOCK_W):
                z = conv_level(
                    image, rings, packed, row0, column0, size, LEVEL, KH, KW, TAP0, RING, RING0,
                    WHOLE_PLANE, ROWS, BLOCK_W, BLOCK_C,
                )  # fmt: skip
                for part in tl.static_range(0, ROWS, GATED_ROWS):
                    gate_rows_up(
                        z, image, gradients, rings, row0 + part, column0, size, part, LEVEL, RING, DZ_RING, RING0,
                        WHOLE_PLANE, SCALE, NEED_GATES, NEED_DZ, GATED_ROWS, BLOCK_W, BLOCK_C,
                    )  # fmt: skip


@triton.jit
def gate_rows_up(
    z,
    image,
    gradients,
    rings,
    row0,
    column0,
    size,
    PART: tl.constexpr,
    LEVEL: tl.constexpr,
    RING: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_DZ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `level_up` makes of ROWS rows of the tuple z, from its PART-th on."""
    LEVELS: tl.constexpr = len(DZ_RING)
    channels = channels_of(BLOCK_C)
    rows, columns = rows_from(row0, ROWS, BLOCK_W), columns_from(column0, ROWS, BLOCK_W)
    offsets = columns * BLOCK_C + channels
    inside = (rows >= 0) & (rows < size.height) & (columns < size.width)
    context, grad = gelu_and_grad(rows_of(z, PART, ROWS), rings.start.dtype.element_ty)
    if NEED_GATES or LEVEL == LEVELS - 1:
        source = row_pointer(gradients.dagg, rows, size.width * image.channels, 0)
        source += columns * image.channels + channels
        gradient = widened(tl.load(source, mask=inside & image.in_channels, other=0.0))
    if NEED_GATES:
        target = row_pointer(gradients.dgates, rows, size.width * (LEVELS + 1), 0)
        target += columns * (LEVELS + 1) + LEVEL
        tl.store(target, tl.sum(gradient * context, axis=1, keep_dims=True) * SCALE, mask=inside)
    slopes = ring_of(rings, RING0[LEVELS - 1 + LEVEL], size, WHOLE_PLANE, BLOCK_C)
    slope_at = row_pointer(slopes.start, rows, slopes.row_pitch, DZ_RING[LEVEL]) + offsets
    if LEVEL < LEVELS - 1:
        ring = ring_of(rings, RING0[LEVEL], size, WHOLE_PLANE, BLOCK_C)
        target = row_pointer(ring.start, rows, ring.row_pitch, RING[LEVEL]) + offsets
        tl.store(target, rounded(context, ring.start.dtype.element_ty), mask=inside)
        if NEED_DZ:
            tl.store(slope_at, rounded(grad, slopes.start.dtype.element_ty), mask=inside)
    elif NEED_DZ:
        gate = load_gates(image.gates + LEVEL, rows, columns, size.width, image.gates_pixel, inside)
        dz = (gradient * (gate * SCALE) + gradients.dmean[None, :]) * grad
        tl.store(slope_at, rounded(dz, slopes.start.dtype.element_ty), mask=inside)


@triton.jit
def dweight_level(
    image,
    rings,
    dz,
    partial,
    first_row,
    tiles,
    size,
    LEVEL: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    RING: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW_l of the rows of a step: dz_l with ctx_l."""
    if LEVEL == 0:
        below = Plane(image.ctx, size.width * image.ctx_pixel, image.ctx_pixel, image.in_channels)
        dweight_rows(dz, below, partial, first_row, tiles, size, DZ_RING[0], 0, KH[0], KW[0], ROWS, BLOCK_W, BLOCK_C)
    else:
        ring = ring_of(rings, RING0[LEVEL - 1], size, WHOLE_PLANE, BLOCK_C)
        dweight_rows(
            dz, ring, partial + TAP0[LEVEL] * BLOCK_C,
            first_row, tiles, size, DZ_RING[LEVEL], RING[LEVEL - 1], KH[LEVEL], KW[LEVEL], ROWS, BLOCK_W, BLOCK_C,
        )  # fmt: skip


@triton.jit
def level_down(
    image,
    gradients,
    rings,
    dz,
    packed,
    step,
    tiles,
    size,
    LEVEL: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    DOWN_LAG: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One level of a step, downwards: dz_l to dz_{l-1}, which takes the place of GELU'(z_{l-1}), or to dctx."""
    GATED_ROWS: tl.constexpr = gated_rows(ROWS, BLOCK_C, MAX_GATED_ROWS)
    for tile in range(tiles):
        row0 = step * STEP + tile * ROWS - DOWN_LAG[LEVEL]
        if (row0 < size.height) & (row0 + ROWS > 0):
            for column0 in range(0, size.width, BLOCK_W):
                sent = conv_tiles(
                    dz, packed + TAP0[LEVEL] * BLOCK_C,
                    row0, column0, size, DZ_RING[LEVEL], KH[LEVEL], KW[LEVEL], True, ROWS, BLOCK_W, BLOCK_C,
                )  # fmt: skip
                for part in tl.static_range(0, ROWS, GATED_ROWS):
                    send_rows_down(
                        sent, image, gradients, rings, row0 + part, column0, size, part, LEVEL,
                        DZ_RING, RING0, WHOLE_PLANE, SCALE, GATED_ROWS, BLOCK_W, BLOCK_C,
                    )  # fmt: skip


@triton.jit
def send_rows_down(
    sent,
    image,
    gradients,
    rings,
    row0,
    column0,
    size,
    PART: tl.constexpr,
    LEVEL: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `level_down` makes of ROWS rows, from the PART-th on, of the gradient that the convolution sends down."""
    channels = channels_of(BLOCK_C)
    rows, columns = rows_from(row0, ROWS, BLOCK_W), columns_from(column0, ROWS, BLOCK_W)
    inside = (rows >= 0) & (rows < size.height) & (columns < size.width)
    here, pixels = inside & image.in_channels, columns * image.channels + channels
    gradient_of_context = rows_of(sent, PART, ROWS)
    if LEVEL == 0:
        target = row_pointer(gradients.dctx, rows, size.width * gradients.dctx_pixel, 0)
        target += columns * gradients.dctx_pixel + channels
        tl.store(target, rounded(gradient_of_context, gradients.dctx.dtype.element_ty), mask=here)
    else:
        gate = load_gates(image.gates + (LEVEL - 1), rows, columns, size.width, image.gates_pixel, inside)
        source = row_pointer(gradients.dagg, rows, size.width * image.channels, 0) + pixels
        gradient = widened(tl.load(source, mask=here, other=0.0))
        slopes = ring_of(rings, RING0[len(DZ_RING) - 2 + LEVEL], size, WHOLE_PLANE, BLOCK_C)
        slope_at = row_pointer(slopes.start, rows, slopes.row_pitch, DZ_RING[LEVEL - 1])
        slope_at += columns * BLOCK_C + channels
        grad = widened(tl.load(slope_at, mask=inside, other=0.0))
        dz = (gradient_of_context + gradient * (gate * SCALE)) * grad
        tl.store(slope_at, rounded(dz, slopes.start.dtype.element_ty), mask=inside)

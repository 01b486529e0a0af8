"""Gated aggregation, backward: levels recomputed, then walked down again, in one launch.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    first                dagg once over the plane: the gradient of the mean, and of the global gate
    then, row by row     forward levels into rings (ctx_l, GELU'(z_l)), the last one straight to dz_{L-1};
                         downwards dW_l += dz_l x ctx_l, then dz_{l-1} = (W_l^T * dz_l + gate * dagg) GELU'(z_{l-1})
    reads once           ctx, dagg, gates; all else is re-read from rings, in practice L1 and L2
    writes once          dctx [H, W, BLOCK_C]; float32 partial sums over its channels (dgates) and images (dW)
    barriers             one after every level, upwards and downwards

Nothing is saved by forward but the operands, and nothing is added atomically: partial sums have one writer each and
are added up by a second kernel in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import schedule
from .config import LevelConfig, level_config
from .gated_aggregation import (
    aligned_pitches,
    alignments,
    bands_of,
    first_rows,
    forward_launches,
    level_constexprs,
    operands,
    pick,
    weight_arguments,
    workers_of,
)
from .plan import Buffer, Case, Device, Launch, Plan, chunks, largest_chunk, with_scratch
from .sums import SUM_BLOCK, sum_partials_launch
from .tiles import columns_of_row, conv_tiles, gelu_and_grad, pack_weights, rounded, row_pointer, zero_tiles


@triton.jit
def ring_start(rings, first_row: tl.constexpr, height, width, WHOLE_PLANE: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = first_row * (height if WHOLE_PLANE else 1)
    return rings + rows * width * BLOCK_C


@triton.jit
def dweight_rows(
    dz,
    plane,
    row_pitch,
    pixel_pitch,
    partial,
    row0,
    tiles,
    height,
    width,
    in_channels,
    DZ_RING: tl.constexpr,
    RING: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial [KH * KW, BLOCK_C] += the correlation of dz with the level below, over ``tiles`` tiles of rows.

    One column of the kernel at a time: its KH sums stay in registers, tile after tile, and are summed over columns of
    the map only then.
    """
    channels = tl.arange(0, BLOCK_C)
    for kx in range(KW):
        sums = zero_tiles(KH, BLOCK_W, BLOCK_C)
        for tile in range(tiles):
            for column0 in range(0, width, BLOCK_W):
                columns = column0 + tl.arange(0, BLOCK_W)
                x = columns + (kx - KW // 2)
                offsets = x[:, None] * pixel_pitch + channels[None, :]
                gradients = ()
                for r in tl.static_range(ROWS):
                    row = row0 + tile * ROWS + r
                    kept_row = row % DZ_RING if DZ_RING > 0 else row
                    limit = tl.where((row >= 0) & (row < height), width, 0)
                    at = kept_row.to(tl.int64) * (width * BLOCK_C) + columns[:, None] * BLOCK_C + channels[None, :]
                    gradient = tl.load(dz + at, mask=(columns < limit)[:, None] & in_channels[None, :], other=0.0)
                    gradients = gradients + (gradient.to(tl.float32),)
                for i in tl.static_range(ROWS + KH - 1):
                    row = row0 + tile * ROWS + (i - KH // 2)
                    kept_row = row % RING if RING > 0 else row
                    limit = tl.where((row >= 0) & (row < height), width, 0)
                    inside = ((x >= 0) & (x < limit))[:, None] & in_channels[None, :]
                    source = plane + kept_row.to(tl.int64) * row_pitch + offsets
                    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
                    grown = ()
                    for ky in tl.static_range(KH):
                        if i >= ky and i - ky < ROWS:
                            grown = grown + (tl.fma(gradients[i - ky], value, sums[ky]),)
                        else:
                            grown = grown + (sums[ky],)
                    sums = grown
        for ky in tl.static_range(KH):
            target = partial + (ky * KW + kx) * BLOCK_C + channels
            tl.store(target, tl.load(target) + tl.sum(sums[ky], axis=0))


@triton.jit(
    do_not_specialize=["first_image", "first_dagg", "images", "bands", "height", "width", "ctx_pitch", "gates_pitch"]
)
def gated_aggregation_bwd_kernel(
    dagg,
    ctx,
    gates,
    w0,
    w1,
    w2,
    w3,
    mean,
    dctx,
    dgates,
    dfocal,
    back_rings,
    back_packed,
    first_image,
    first_dagg,
    images,
    bands,
    height,
    width,
    ctx_pitch,
    gates_pitch,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    LAG: tl.constexpr,
    DZ_LAG: tl.constexpr,
    DOWN_LAG: tl.constexpr,
    RING: tl.constexpr,
    DZ_RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    NEED_CTX: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_FOCAL: tl.constexpr,
    CTX_ALIGN: tl.constexpr,
    GATES_ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """mean [images, bands, C] and dgates [blocks, images, H, W, L + 1] of the chunk; dagg from its first_dagg on.

    dfocal [programs, taps, BLOCK_C] goes on from what earlier chunks left. RING0 lists where the rings start: of
    ctx_1 .., then of dz_0 ..; until dz_l is known, its place holds GELU'(z_l).
    """
    LEVELS: tl.constexpr = len(KH)
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    workers = tl.num_programs(0) // blocks
    worker = program // blocks
    channel0 = (program % blocks) * BLOCK_C
    channels = tl.arange(0, BLOCK_C)
    in_channels = channel0 + channels < C
    all_channels = channels < BLOCK_C
    ring_row = width * BLOCK_C
    # Makes a tensor of every row, in the interpreter too.
    top = program * 0

    rings = ring_start(
        back_rings, 1, program.to(tl.int64) * RING0[2 * LEVELS - 1] * (height if WHOLE_PLANE else 1), width,
        True, BLOCK_C,
    )  # fmt: skip
    packed = back_packed + program * (TAP0[LEVELS] * BLOCK_C)
    partial = dfocal + program * (TAP0[LEVELS] * BLOCK_C)
    for level in tl.static_range(LEVELS):
        pack_weights(
            packed + TAP0[level] * BLOCK_C,
            pick(level, w0, w1, w2, w3),
            channel0,
            C,
            KH[level] * KW[level],
            16,
            BLOCK_C,
        )
    tl.debug_barrier()

    ctx_pixel = ctx_pitch * CTX_ALIGN
    gates_pixel = gates_pitch * GATES_ALIGN
    for trip in range(tl.cdiv(images - worker, workers)):
        image = worker + trip * workers
        whole = tl.zeros((BLOCK_C,), tl.float32)
        for band in range(bands):
            whole += tl.load(mean + (image * bands + band) * C + channel0 + channels, mask=in_channels, other=0.0)
        global_context, global_grad = gelu_and_grad(whole)
        plane = (first_image + image).to(tl.int64) * height * width
        ctx_plane = ctx + plane * ctx_pixel + channel0
        gates_plane = gates + plane * gates_pixel
        dctx_plane = dctx + plane * C + channel0
        dagg_plane = dagg + (first_dagg + image).to(tl.int64) * height * width * C + channel0
        block = (program % blocks).to(tl.int64)
        dgates_plane = dgates + (block * images + image) * height * width * (LEVELS + 1)

        total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        for first in range(0, height * width, BLOCK_W):
            pixels = first + tl.arange(0, BLOCK_W)
            inside = pixels < height * width
            here = inside[:, None] & in_channels[None, :]
            source = dagg_plane + pixels.to(tl.int64)[:, None] * C + channels[None, :]
            gradient = tl.load(source, mask=here, other=0.0).to(tl.float32)
            gate_at = gates_plane + pixels.to(tl.int64) * gates_pixel + LEVELS
            total += gradient * tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)[:, None]
            if NEED_GATES:
                target = dgates_plane + pixels.to(tl.int64) * (LEVELS + 1) + LEVELS
                tl.store(target, tl.sum(gradient * global_context[None, :], axis=1) * SCALE, mask=inside)
        dmean = tl.sum(total, axis=0) * global_grad * (SCALE / (height * width))

        steps = tl.cdiv(height + DOWN_LAG[0], STEP)
        tiles = tl.cdiv(STEP, ROWS)
        if WHOLE_PLANE:
            steps = 1
            tiles = tl.cdiv(height, ROWS)
        for step in range(steps):
            for level in tl.static_range(LEVELS):
                for tile in range(tiles):
                    row0 = top + step * STEP + tile * ROWS - LAG[level]
                    if (row0 < height) & (row0 + ROWS > 0):
                        for column0 in range(0, width, BLOCK_W):
                            columns = column0 + tl.arange(0, BLOCK_W)
                            offsets = columns[:, None] * BLOCK_C + channels[None, :]
                            if level == 0:
                                z = conv_tiles(
                                    ctx_plane, width * ctx_pixel, ctx_pixel, packed, row0, column0, height, width,
                                    in_channels, 0, KH[0], KW[0], False, ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            else:
                                z = conv_tiles(
                                    ring_start(rings, RING0[level - 1], height, width, WHOLE_PLANE, BLOCK_C), ring_row,
                                    BLOCK_C, packed + TAP0[level] * BLOCK_C, row0, column0, height, width,
                                    all_channels, RING[level - 1], KH[level], KW[level], False, ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            for r in tl.static_range(ROWS):
                                row = row0 + r
                                inside = columns_of_row(columns, row, 0, height, width)
                                here = inside[:, None] & in_channels[None, :]
                                context, grad = gelu_and_grad(z[r])
                                pixels = row.to(tl.int64) * width + columns
                                if NEED_GATES or level == LEVELS - 1:
                                    source = dagg_plane + pixels[:, None] * C + channels[None, :]
                                    gradient = tl.load(source, mask=here, other=0.0).to(tl.float32)
                                if NEED_GATES:
                                    target = dgates_plane + pixels * (LEVELS + 1) + level
                                    tl.store(target, tl.sum(gradient * context, axis=1) * SCALE, mask=inside)
                                if level < LEVELS - 1:
                                    ring = ring_start(rings, RING0[level], height, width, WHOLE_PLANE, BLOCK_C)
                                    target = row_pointer(ring, row, ring_row, RING[level]) + offsets
                                    tl.store(target, rounded(context, rings.dtype.element_ty), mask=inside[:, None])
                                    if NEED_CTX or NEED_FOCAL:
                                        ring = ring_start(
                                            rings, RING0[LEVELS - 1 + level], height, width, WHOLE_PLANE, BLOCK_C
                                        )
                                        target = row_pointer(ring, row, ring_row, DZ_RING[level]) + offsets
                                        tl.store(target, rounded(grad, rings.dtype.element_ty), mask=inside[:, None])
                                elif NEED_CTX or NEED_FOCAL:
                                    gate_at = gates_plane + pixels * gates_pixel + level
                                    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32) * SCALE
                                    dz = (gradient * gate[:, None] + dmean[None, :]) * grad
                                    ring = ring_start(
                                        rings, RING0[LEVELS - 1 + level], height, width, WHOLE_PLANE, BLOCK_C
                                    )
                                    target = row_pointer(ring, row, ring_row, DZ_RING[level]) + offsets
                                    tl.store(target, rounded(dz, rings.dtype.element_ty), mask=inside[:, None])
                tl.debug_barrier()
            if NEED_CTX or NEED_FOCAL:
                for level in tl.static_range(LEVELS - 1, -1, -1):
                    dz_ring = ring_start(rings, RING0[LEVELS - 1 + level], height, width, WHOLE_PLANE, BLOCK_C)
                    if NEED_FOCAL:
                        row0 = top + step * STEP - DZ_LAG[level]
                        if level == 0:
                            dweight_rows(
                                dz_ring, ctx_plane, width * ctx_pixel, ctx_pixel, partial, row0, tiles,
                                height, width, in_channels, DZ_RING[0], 0, KH[0], KW[0], ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
                        else:
                            dweight_rows(
                                dz_ring, ring_start(rings, RING0[level - 1], height, width, WHOLE_PLANE, BLOCK_C),
                                ring_row, BLOCK_C, partial + TAP0[level] * BLOCK_C, row0, tiles, height, width,
                                all_channels, DZ_RING[level], RING[level - 1], KH[level], KW[level],
                                ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
                    if level > 0 or NEED_CTX:
                        for tile in range(tiles):
                            row0 = top + step * STEP + tile * ROWS - DOWN_LAG[level]
                            if (row0 < height) & (row0 + ROWS > 0):
                                for column0 in range(0, width, BLOCK_W):
                                    columns = column0 + tl.arange(0, BLOCK_W)
                                    offsets = columns[:, None] * BLOCK_C + channels[None, :]
                                    down = conv_tiles(
                                        dz_ring, ring_row, BLOCK_C, packed + TAP0[level] * BLOCK_C, row0, column0,
                                        height, width, all_channels, DZ_RING[level], KH[level], KW[level], True,
                                        ROWS, BLOCK_W, BLOCK_C,
                                    )  # fmt: skip
                                    for r in tl.static_range(ROWS):
                                        row = row0 + r
                                        inside = columns_of_row(columns, row, 0, height, width)
                                        here = inside[:, None] & in_channels[None, :]
                                        pixels = row.to(tl.int64) * width + columns
                                        at = pixels[:, None] * C + channels[None, :]
                                        if level == 0:
                                            tl.store(
                                                dctx_plane + at, rounded(down[r], dctx.dtype.element_ty), mask=here
                                            )
                                        else:
                                            gate_at = gates_plane + pixels * gates_pixel + (level - 1)
                                            gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32) * SCALE
                                            gradient = tl.load(dagg_plane + at, mask=here, other=0.0).to(tl.float32)
                                            ring = ring_start(
                                                rings, RING0[LEVELS - 2 + level], height, width, WHOLE_PLANE, BLOCK_C
                                            )
                                            source = row_pointer(ring, row, ring_row, DZ_RING[level - 1]) + offsets
                                            grad = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
                                            dz = (down[r] + gradient * gate[:, None]) * grad
                                            ring = ring_start(
                                                rings, RING0[LEVELS - 2 + level], height, width, WHOLE_PLANE,
                                                BLOCK_C,
                                            )  # fmt: skip
                                            target = row_pointer(ring, row, ring_row, DZ_RING[level - 1]) + offsets
                                            tl.store(target, rounded(dz, rings.dtype.element_ty), mask=inside[:, None])
                    tl.debug_barrier()
        tl.debug_barrier()


@triton.jit(do_not_specialize=["workers"])
def sum_focal_weights_kernel(
    dfocal,
    out,
    workers,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAP0: tl.constexpr,
    ALL_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (C, 1, kh, kw) of one level = the sum of dfocal [workers, blocks, ALL_TAPS, BLOCK_C] over the workers."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, tap = at // TAPS, at % TAPS
    source = dfocal + ((channel // BLOCK_C) * ALL_TAPS + TAP0 + tap) * BLOCK_C + channel % BLOCK_C
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(workers):
        acc += tl.load(source, mask=at < C * TAPS, other=0.0)
        source += blocks * ALL_TAPS * BLOCK_C
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=at < C * TAPS)


# ---- plans ----------------------------------------------------------------------------------------------------------


def backward_plan(case: Case, device: Device, config: LevelConfig | None = None) -> Plan:
    """The launches of ``gated_aggregation`` backward: operands dagg, ctx, gates, w0..; mask (ctx, gates, focal).

    Outputs are dctx, dgates and dw0.., as the mask asks for.
    """
    config = config or level_config(case.height, case.width, case.channels)

    def alive(images: int) -> int:
        mean = forward_launches(case, device, config, 0, images, store_agg=False)[2]
        return max(mean, Backward(case, device, config, case.mask, images).alive(images))

    chunk = largest_chunk(case, device, config, alive)
    steps = Backward(case, device, config, case.mask, chunk)
    launches, buffers = [], steps.buffers()
    for first, images in chunks(case.batch, chunk):
        mean, scratch, _ = forward_launches(case, device, config, first, images, store_agg=False, chunk=chunk)
        buffers = with_scratch(buffers, scratch)
        launches += [*mean, *steps.launches(first, images, "dagg", first_dagg=first)]
    launches += steps.last_launches()
    return Plan(launches, buffers, operands(case) | {"dagg": case.dtype}, alive(chunk))


@dataclass(frozen=True)
class Backward:
    """The aggregation's part of a backward plan, chunk by chunk. ``mask`` asks for (ctx, gates, focal_weights)."""

    case: Case
    device: Device
    config: LevelConfig
    mask: tuple[bool, ...]
    chunk: int

    @property
    def timetable(self) -> schedule.Schedule:
        return schedule.backward(self.case.kernel_heights, self.config.step, self.config.whole_plane)

    @property
    def blocks(self) -> int:
        return math.ceil(self.case.channels / self.config.block_c)

    @property
    def ring_elements(self) -> int:
        return self.timetable.rows_kept(self.case.height) * self.case.width * self.config.block_c

    @property
    def own_bytes(self) -> int:
        """Scratch of one program: rings, packed weights, their gradients."""
        return self.ring_elements * self.case.dtype.itemsize + 8 * self.case.taps * self.config.block_c

    def workers(self, images: int) -> int:
        return workers_of(self.device, self.config, images, self.blocks, self.own_bytes)

    def alive(self, images: int) -> int:
        return self.workers(images) * self.blocks * self.own_bytes + self.dgates_parts(images).nbytes

    def dgates_parts(self, images: int) -> Buffer:
        case = self.case
        size = images * case.positions * (case.levels + 1) if self.mask[1] else 1
        return Buffer((self.blocks, size), torch.float32)

    def buffers(self) -> dict[str, Buffer]:
        case, (need_ctx, need_gates, need_focal) = self.case, self.mask
        programs = self.workers(self.chunk) * self.blocks
        made = {
            "back_rings": Buffer((programs, self.ring_elements), case.dtype),
            "back_packed": Buffer((programs, case.taps, self.config.block_c), torch.float32),
            "dfocal": Buffer((programs, case.taps, self.config.block_c), torch.float32, zeroed=True),
            "dgates_parts": self.dgates_parts(self.chunk),
        }
        image = (case.batch, case.height, case.width)
        if need_ctx:
            made["dctx"] = Buffer((*image, case.channels), case.dtype, is_output=True)
        if need_gates:
            made["dgates"] = Buffer((*image, case.levels + 1), case.dtype, is_output=True)
        if need_focal:
            for level, size in enumerate(case.kernel_sizes):
                made[f"dw{level}"] = Buffer((case.channels, 1, *size), case.dtype, is_output=True)
        return made

    def launches(self, first_image: int, images: int, dagg: str, first_dagg: int = 0) -> list[Launch]:
        """Of one chunk; ``dagg`` names the tensor that holds the chunk's gradient of agg, from image first_dagg on."""
        case = self.case
        launches = [self.down(first_image, images, dagg, first_dagg)]
        if self.mask[1]:
            unit = case.positions * (case.levels + 1)
            launches.append(
                sum_partials_launch("dgates_parts", "dgates", self.blocks, images * unit, first_image, unit)
            )
        return launches

    def down(self, first_image: int, images: int, dagg: str, first_dagg: int) -> Launch:
        case, config, timetable = self.case, self.config, self.timetable
        need_ctx, need_gates, need_focal = self.mask
        rings = (*timetable.ring[:-1], *timetable.dz_ring)
        return Launch(
            gated_aggregation_bwd_kernel,
            (self.workers(self.chunk) * self.blocks, 1, 1),
            {
                "dagg": dagg,
                "ctx": "ctx",
                "gates": "gates",
                **weight_arguments(case),
                "mean": "mean",
                "dctx": "dctx" if need_ctx else "mean",
                "dgates": "dgates_parts",
                "dfocal": "dfocal",
                "back_rings": "back_rings",
                "back_packed": "back_packed",
                "first_image": first_image,
                "first_dagg": first_dagg,
                "images": images,
                "bands": bands_of(case, self.device, config, self.chunk * self.blocks),
                "height": case.height,
                "width": case.width,
                **aligned_pitches(case),
            },
            {
                **level_constexprs(case, config),
                "ROWS": config.back_rows,
                "STEP": config.step,
                "LAG": timetable.lag,
                "DZ_LAG": timetable.dz_lag,
                "DOWN_LAG": timetable.down_lag,
                "RING": timetable.ring,
                "DZ_RING": timetable.dz_ring,
                "RING0": first_rows(rings, config),
                "SCALE": case.scale,
                "NEED_CTX": need_ctx,
                "NEED_GATES": need_gates,
                "NEED_FOCAL": need_focal,
                **alignments(case),
            },
            config.num_warps,
        )

    def last_launches(self) -> list[Launch]:
        """What adds up the weights' partial sums once all chunks are done."""
        case = self.case
        if not self.mask[2]:
            return []
        launches, tap0 = [], 0
        for level, (kh, kw) in enumerate(case.kernel_sizes):
            launches.append(
                Launch(
                    sum_focal_weights_kernel,
                    (math.ceil(case.channels * kh * kw / SUM_BLOCK), 1, 1),
                    {"dfocal": "dfocal", "out": f"dw{level}", "workers": self.workers(self.chunk)},
                    {
                        "C": case.channels,
                        "TAPS": kh * kw,
                        "TAP0": tap0,
                        "ALL_TAPS": case.taps,
                        "BLOCK_C": self.config.block_c,
                        "BLOCK": SUM_BLOCK,
                    },
                    num_warps=4,
                )
            )
            tap0 += kh * kw
        return launches

"""Gated aggregation, backward: levels recomputed, then walked down again, in one launch.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    first                dagg once over the plane: the gradient of the mean, and of the global gate
    then, row by row     forward levels into rings (ctx_l, GELU'(z_l)), the last one straight to dz_{L-1};
                         downwards dW_l += dz_l x ctx_l, then dz_{l-1} = (W_l^T * dz_l + gate * dagg) GELU'(z_{l-1})
    reads once           ctx, dagg, gates; all else is re-read from rings, in practice L1 and L2
    writes once          dctx [H, W, BLOCK_C]; float32 partial sums over its channels (dgates) and images (dW)
    barriers             one after every level, upwards and downwards

Nothing is saved by forward but the operands, and nothing is added atomically: partial sums have one writer each and
are added up by a second kernel in a fixed order. The way up, the way down and the launch that sizes their rings share
one layout, and are read together: hence one long file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    ring_start,
    weight_arguments,
    workers_of,
)
from .plan import Buffer, Case, Device, Launch, Plan, chunks, largest_chunk, with_scratch
from .sums import SUM_BLOCK, sum_partials_launch
from .tiles import (
    channels_of,
    columns_from,
    conv_tiles,
    gelu_and_grad,
    load_gates,
    load_rows,
    pack_weights,
    part_size,
    rounded,
    row_pointer,
    rows_from,
    rows_of,
    starts_part,
    zero_tiles,
)


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

    One column of the kernel at a time: its sums stay in registers, tile after tile, and are summed over columns of the
    map only then. Half of a tall column at a time: 15 sums and the rows that they meet do not fit.
    """
    TAPS: tl.constexpr = KH if KH <= 9 else (KH + 1) // 2
    for kx in range(KW):
        for first in tl.static_range(0, KH, TAPS):
            dweight_column(
                dz, plane, row_pitch, pixel_pitch, partial + (first * KW + kx) * BLOCK_C, row0, first - KH // 2,
                kx - KW // 2, tiles, height, width, in_channels, DZ_RING, RING, min(TAPS, KH - first), KW,
                ROWS, BLOCK_W, BLOCK_C,
            )  # fmt: skip


@triton.jit
def dweight_column(
    dz,
    plane,
    row_pitch,
    pixel_pitch,
    partial,
    row0,
    down,
    right,
    tiles,
    height,
    width,
    in_channels,
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
        for column0 in range(0, width, BLOCK_W):
            first_row = row0 + tile * ROWS
            gradients = load_rows(
                dz, width * BLOCK_C, BLOCK_C, first_row, column0, height, width, in_channels,
                DZ_RING, ROWS, BLOCK_W, BLOCK_C,
            )  # fmt: skip
            values = ()
            for i in tl.static_range(ROWS + TAPS - 1):
                if starts_part(i, ROWS + TAPS - 1):
                    values = values + load_rows(
                        plane, row_pitch, pixel_pitch, first_row + down + i, column0 + right, height, width,
                        in_channels, RING, part_size(i, ROWS + TAPS - 1), BLOCK_W, BLOCK_C,
                    )  # fmt: skip
                grown = ()
                for tap in tl.static_range(TAPS):
                    if i >= tap and i - tap < ROWS:
                        grown = grown + (tl.fma(gradients[i - tap], values[i], sums[tap]),)
                    else:
                        grown = grown + (sums[tap],)
                sums = grown
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


@triton.jit(
    do_not_specialize=[
        "first_image", "first_dagg", "images", "bands", "height", "width", "channel_units", "ctx_pitch", "gates_pitch",
    ]
)  # fmt: skip
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
    channel_units,
    ctx_pitch,
    gates_pitch,
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
    CHANNELS_ALIGN: tl.constexpr,
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
    # As many rows at once as a load of their gates takes less than one element a thread, and fit into registers.
    GATED_ROWS: tl.constexpr = min(ROWS, BLOCK_C // 8, 4)
    BLOCK_P: tl.constexpr = GATED_ROWS * BLOCK_W
    C = channel_units * CHANNELS_ALIGN
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    workers = tl.num_programs(0) // blocks
    worker = program // blocks
    channel0 = (program % blocks) * BLOCK_C
    channels = channels_of(BLOCK_C)
    in_channels = channel0 + channels < C
    all_channels = channels < BLOCK_C
    own = channel0 + tl.arange(0, BLOCK_C)
    ring_row = width * BLOCK_C

    scratch_rows = RING0[2 * LEVELS - 1] * (height if WHOLE_PLANE else 1)
    rings = back_rings + program.to(tl.int64) * scratch_rows * ring_row
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
            whole += tl.load(mean + (image * bands + band) * C + own, mask=own < C, other=0.0)
        global_context, global_grad = gelu_and_grad(whole)
        plane = (first_image + image).to(tl.int64) * height * width
        ctx_plane = ctx + plane * ctx_pixel + channel0
        gates_plane = gates + plane * gates_pixel
        dctx_plane = dctx + plane * C + channel0
        dagg_plane = dagg + (first_dagg + image).to(tl.int64) * height * width * C + channel0
        block = (program % blocks).to(tl.int64)
        dgates_plane = dgates + (block * images + image) * height * width * (LEVELS + 1)

        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, height * width, BLOCK_P):
            pixels = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = pixels < height * width
            source = dagg_plane + pixels[:, None] * C + tl.max_contiguous(tl.arange(0, BLOCK_C), 4)[None, :]
            gradient = tl.load(source, mask=inside[:, None] & (own < C)[None, :], other=0.0).to(tl.float32)
            gate = tl.load(gates_plane + pixels * gates_pixel + LEVELS, mask=inside, other=0.0).to(tl.float32)
            total += gradient * gate[:, None]
            if NEED_GATES:
                target = dgates_plane + pixels * (LEVELS + 1) + LEVELS
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
                    row0 = step * STEP + tile * ROWS - LAG[level]
                    if (row0 < height) & (row0 + ROWS > 0):
                        for column0 in range(0, width, BLOCK_W):
                            if level == 0:
                                z = conv_tiles(
                                    ctx_plane, width * ctx_pixel, ctx_pixel, packed, row0, column0, height, width,
                                    in_channels, 0, KH[0], KW[0], False, ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            else:
                                z = conv_tiles(
                                    ring_start(rings, RING0[level - 1], height, ring_row, WHOLE_PLANE), ring_row,
                                    BLOCK_C, packed + TAP0[level] * BLOCK_C, row0, column0, height, width,
                                    all_channels, RING[level - 1], KH[level], KW[level], False, ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            for part in tl.static_range(0, ROWS, GATED_ROWS):
                                rows = rows_from(row0 + part, GATED_ROWS, BLOCK_W)
                                columns = columns_from(column0, GATED_ROWS, BLOCK_W)
                                offsets = columns * BLOCK_C + channels
                                inside = (rows >= 0) & (rows < height) & (columns < width)
                                context, grad = gelu_and_grad(rows_of(z, part, GATED_ROWS))
                                if NEED_GATES or level == LEVELS - 1:
                                    source = row_pointer(dagg_plane, rows, width * C, 0) + (columns * C + channels)
                                    gradient = tl.load(source, mask=inside & in_channels, other=0.0).to(tl.float32)
                                if NEED_GATES:
                                    target = row_pointer(dgates_plane, rows, width * (LEVELS + 1), 0)
                                    target += columns * (LEVELS + 1) + level
                                    sent = tl.sum(gradient * context, axis=1, keep_dims=True) * SCALE
                                    tl.store(target, sent, mask=inside)
                                slopes = ring_start(rings, RING0[LEVELS - 1 + level], height, ring_row, WHOLE_PLANE)
                                slope_at = row_pointer(slopes, rows, ring_row, DZ_RING[level]) + offsets
                                if level < LEVELS - 1:
                                    ring = ring_start(rings, RING0[level], height, ring_row, WHOLE_PLANE)
                                    target = row_pointer(ring, rows, ring_row, RING[level]) + offsets
                                    tl.store(target, rounded(context, rings.dtype.element_ty), mask=inside)
                                    if NEED_CTX or NEED_FOCAL:
                                        tl.store(slope_at, rounded(grad, rings.dtype.element_ty), mask=inside)
                                elif NEED_CTX or NEED_FOCAL:
                                    gate = load_gates(gates_plane + level, rows, columns, width, gates_pixel, inside)
                                    dz = (gradient * (gate * SCALE) + dmean[None, :]) * grad
                                    tl.store(slope_at, rounded(dz, rings.dtype.element_ty), mask=inside)
                tl.debug_barrier()
            if NEED_CTX or NEED_FOCAL:
                for level in tl.static_range(LEVELS - 1, -1, -1):
                    dz_ring = ring_start(rings, RING0[LEVELS - 1 + level], height, ring_row, WHOLE_PLANE)
                    if NEED_FOCAL:
                        row0 = step * STEP - DZ_LAG[level]
                        if level == 0:
                            dweight_rows(
                                dz_ring, ctx_plane, width * ctx_pixel, ctx_pixel, partial, row0, tiles,
                                height, width, in_channels, DZ_RING[0], 0, KH[0], KW[0], ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
                        else:
                            dweight_rows(
                                dz_ring, ring_start(rings, RING0[level - 1], height, ring_row, WHOLE_PLANE),
                                ring_row, BLOCK_C, partial + TAP0[level] * BLOCK_C, row0, tiles, height, width,
                                all_channels, DZ_RING[level], RING[level - 1], KH[level], KW[level],
                                ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
                    if level > 0 or NEED_CTX:
                        for tile in range(tiles):
                            row0 = step * STEP + tile * ROWS - DOWN_LAG[level]
                            if (row0 < height) & (row0 + ROWS > 0):
                                for column0 in range(0, width, BLOCK_W):
                                    down = conv_tiles(
                                        dz_ring, ring_row, BLOCK_C, packed + TAP0[level] * BLOCK_C, row0, column0,
                                        height, width, all_channels, DZ_RING[level], KH[level], KW[level], True,
                                        ROWS, BLOCK_W, BLOCK_C,
                                    )  # fmt: skip
                                    for part in tl.static_range(0, ROWS, GATED_ROWS):
                                        rows = rows_from(row0 + part, GATED_ROWS, BLOCK_W)
                                        columns = columns_from(column0, GATED_ROWS, BLOCK_W)
                                        inside = (rows >= 0) & (rows < height) & (columns < width)
                                        here, pixels = inside & in_channels, columns * C + channels
                                        sent = rows_of(down, part, GATED_ROWS)
                                        if level == 0:
                                            target = row_pointer(dctx_plane, rows, width * C, 0) + pixels
                                            tl.store(target, rounded(sent, dctx.dtype.element_ty), mask=here)
                                        else:
                                            gate = load_gates(
                                                gates_plane + (level - 1), rows, columns, width, gates_pixel, inside
                                            )
                                            source = row_pointer(dagg_plane, rows, width * C, 0) + pixels
                                            gradient = tl.load(source, mask=here, other=0.0).to(tl.float32)
                                            slopes = ring_start(
                                                rings, RING0[LEVELS - 2 + level], height, ring_row, WHOLE_PLANE
                                            )
                                            slope_at = row_pointer(slopes, rows, ring_row, DZ_RING[level - 1])
                                            slope_at += columns * BLOCK_C + channels
                                            grad = tl.load(slope_at, mask=inside, other=0.0).to(tl.float32)
                                            dz = (sent + gradient * (gate * SCALE)) * grad
                                            tl.store(slope_at, rounded(dz, rings.dtype.element_ty), mask=inside)
                    tl.debug_barrier()
        tl.debug_barrier()


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


# ---- plans ----------------------------------------------------------------------------------------------------------


def backward_plan(case: Case, device: Device, config: LevelConfig | None = None) -> Plan:
    """The launches of ``gated_aggregation`` backward: operands dagg, ctx, gates, w0..; mask (ctx, gates, focal).

    Outputs are dctx, dgates and dw0.., as the mask asks for.
    """
    config = config or level_config(case.height, case.width, case.channels, case.kernel_heights, case.dtype)

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
        # One program a processor: rings take what the planes of a chunk need, and chunks read every weight anew.
        config = replace(self.config, programs_per_sm=1)
        return workers_of(self.device, config, images, self.blocks, self.own_bytes)

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
            maxnreg=config.registers(config.back_rows),
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
                    {
                        "dfocal": "dfocal",
                        "out": f"dw{level}",
                        "workers": self.workers(self.chunk),
                        "channels": case.channels,
                        "taps": kh * kw,
                        "tap0": tap0,
                        "all_taps": case.taps,
                        "block_c": self.config.block_c,
                    },
                    {"BLOCK": SUM_BLOCK},
                    num_warps=4,
                )
            )
            tap0 += kh * kw
        return launches

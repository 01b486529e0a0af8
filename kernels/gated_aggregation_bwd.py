"""Gated aggregation, backward: levels recomputed, then walked down again, in one launch.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    first                dagg once over the plane: the gradient of the mean, and of the global gate
    then, row by row     forward levels into rings (ctx_l, GELU'(z_l)), the last one straight to dz_{L-1};
                         downwards dW_l += dz_l x ctx_l, then dz_{l-1} = (W_l^T * dz_l + gate * dagg) GELU'(z_{l-1})
    reads                ctx, dagg, gates from memory; what is read again comes from rings, in practice L1 and L2
    writes once          dctx [H, W, BLOCK_C]; float32 partial sums over its channels (dgates) and images (dW)
    barriers             one after every level, upwards and downwards

Bytes: 3 C + (L + 1) C / BLOCK_C elements a position, and as many float32 partial sums of dgates as gates are read,
which the next kernel finds in the L2. Forward saves nothing but the operands. Nothing is added atomically: a partial
sum has one writer, and a second kernel adds them up in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import schedule
from .focal_weights import sum_focal_weights_launches
from .gated_aggregation import forward_launches
from .launch_table import LevelConfig
from .level_launch import (
    aligned_pitches,
    alignment,
    alignments,
    bands_of,
    first_rows,
    level_config_of,
    level_constexprs,
    operands,
    weight_arguments,
    workers_of,
)
from .levels import Image, gated_rows, pack_levels, rings_of_program, share_of_program
from .levels_bwd import MAX_GATED_ROWS, Gradients, dweight_level, global_level_bwd, level_down, level_up
from .plan import Buffer, Case, Device, Launch, Plan, chunks, largest_chunk, with_scratch
from .sums import sum_partials_launch
from .tiles import Size, gelu_and_grad, ring_of


@triton.jit(
    do_not_specialize=[
        "first_image", "first_dagg", "images", "bands", "height", "width", "channel_units", "ctx_pitch", "gates_pitch",
        "dctx_pitch",
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
    dctx_pitch,
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
    DCTX_ALIGN: tl.constexpr,
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
    BLOCK_P: tl.constexpr = gated_rows(ROWS, BLOCK_C, MAX_GATED_ROWS) * BLOCK_W
    size, C = Size(height, width), channel_units * CHANNELS_ALIGN
    share = share_of_program(C, BLOCK_C)
    own = share.own
    rings = rings_of_program(back_rings, share.in_ring, size, RING0[2 * LEVELS - 1], WHOLE_PLANE, BLOCK_C)
    packed = back_packed + tl.program_id(0) * (TAP0[LEVELS] * BLOCK_C)
    partial = dfocal + tl.program_id(0) * (TAP0[LEVELS] * BLOCK_C)
    pack_levels(packed, (w0, w1, w2, w3), share.channel0, C, KH, KW, TAP0, BLOCK_C)

    ctx_pixel = ctx_pitch * CTX_ALIGN
    gates_pixel = gates_pitch * GATES_ALIGN
    dctx_pixel = dctx_pitch * DCTX_ALIGN
    for trip in range(tl.cdiv(images - share.worker, share.workers)):
        number = share.worker + trip * share.workers
        whole = tl.zeros((BLOCK_C,), tl.float32)
        for band in range(bands):
            whole += tl.load(mean + (number * bands + band) * C + own, mask=own < C, other=0.0)
        global_context, global_grad = gelu_and_grad(whole, tl.float32)
        plane = (first_image + number).to(tl.int64) * height * width
        ctx_plane = ctx + plane * ctx_pixel + share.channel0
        gates_plane = gates + plane * gates_pixel
        dctx_plane = dctx + plane * dctx_pixel + share.channel0
        dagg_plane = dagg + (first_dagg + number).to(tl.int64) * height * width * C + share.channel0
        dgates_plane = dgates + (share.block.to(tl.int64) * images + number) * height * width * (LEVELS + 1)
        image = Image(ctx_plane, ctx_pixel, gates_plane, gates_pixel, C, share.in_channels)

        total = global_level_bwd(
            image, dagg_plane, dgates_plane, global_context, size, own, LEVELS, SCALE, NEED_GATES, BLOCK_P, BLOCK_C
        )
        dmean = total * global_grad * (SCALE / (height * width))
        gradients = Gradients(dagg_plane, dctx_plane, dctx_pixel, dgates_plane, dmean)

        steps = tl.cdiv(height + DOWN_LAG[0], STEP)
        tiles = tl.cdiv(STEP, ROWS)
        if WHOLE_PLANE:
            steps = 1
            tiles = tl.cdiv(height, ROWS)
        for step in range(steps):
            for level in tl.static_range(LEVELS):
                level_up(
                    image, gradients, rings, packed, step, tiles, size, level, KH, KW, TAP0, LAG, RING, DZ_RING, RING0,
                    WHOLE_PLANE, SCALE, NEED_GATES, NEED_CTX or NEED_FOCAL, STEP, ROWS, BLOCK_W, BLOCK_C,
                )  # fmt: skip
                tl.debug_barrier()
            if NEED_CTX or NEED_FOCAL:
                for level in tl.static_range(LEVELS - 1, -1, -1):
                    dz = ring_of(rings, RING0[LEVELS - 1 + level], size, WHOLE_PLANE, BLOCK_C)
                    if NEED_FOCAL:
                        dweight_level(
                            image, rings, dz, partial, step * STEP - DZ_LAG[level], tiles, size, level,
                            KH, KW, TAP0, RING, DZ_RING, RING0, WHOLE_PLANE, ROWS, BLOCK_W, BLOCK_C,
                        )  # fmt: skip
                    if level > 0 or NEED_CTX:
                        level_down(
                            image, gradients, rings, dz, packed, step, tiles, size, level, KH, KW, TAP0, DOWN_LAG,
                            DZ_RING, RING0, WHOLE_PLANE, SCALE, STEP, ROWS, BLOCK_W, BLOCK_C,
                        )  # fmt: skip
                    tl.debug_barrier()
        tl.debug_barrier()


# ---- plans ----------------------------------------------------------------------------------------------------------


def backward_plan(case: Case, device: Device, config: LevelConfig | None = None) -> Plan:
    """The launches of ``gated_aggregation`` backward: operands dagg, ctx, gates, w0..; mask (ctx, gates, focal).

    Outputs are dctx, dgates and dw0.., as the mask asks for.
    """
    config = config or level_config_of(case, device)

    def alive(images: int) -> int:
        mean = forward_launches(case, device, config, 0, images, store_agg=False)[2]
        return max(mean, Backward(case, device, config, case.mask, images).alive(images))

    chunk = largest_chunk(case, device, config)
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
        return workers_of(self.device, self.config, images, self.blocks)

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
        if need_ctx and not case.gradient_pitch:
            made["dctx"] = Buffer((*image, case.channels), case.dtype, is_output=True)
        if need_gates and not case.gradient_pitch:
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
            elements = images * case.positions * (case.levels + 1)
            first_row = first_image * case.positions
            rows = {"columns": case.levels + 1, "pitch": case.dgates_pitch}
            launches.append(sum_partials_launch("dgates_parts", "dgates", self.blocks, elements, first_row, **rows))
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
                "dctx_pitch": case.dctx_pitch // alignment(case.dctx_pitch, case.dtype),
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
                "DCTX_ALIGN": alignment(case.dctx_pitch, case.dtype),
            },
            config.num_warps,
            maxnreg=config.registers(config.back_rows),
        )

    def last_launches(self) -> list[Launch]:
        """What adds up the weights' partial sums once all chunks are done."""
        if not self.mask[2]:
            return []
        return sum_focal_weights_launches(self.case, self.workers(self.chunk), self.config.block_c)

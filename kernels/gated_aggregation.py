"""Gated aggregation, forward: all levels, gates and the global level in one launch.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    reads once           ctx [H, W, BLOCK_C], gates [H, W, L + 1], its weights, packed to float32 [taps, BLOCK_C]
    keeps in rings       ctx_1 .. ctx_{L-1}: global scratch of the program, a few rows each, in practice L1 and L2
    writes once          agg [H, W, BLOCK_C] (and again with the global level, from L2), or mean [BLOCK_C]
    barriers             one between any two levels of a step: a level reads pixels that other threads wrote

Bytes: 2 C + (L + 1) C / BLOCK_C elements a position, where the least is 2 C + L + 1. Every program has scratch of its
own, so there are only as many programs as are resident at once, and they walk over the images.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import schedule
from .launch_table import LevelConfig
from .level_launch import (
    aligned_pitches,
    alignments,
    bands_of,
    first_rows,
    level_config_of,
    level_constexprs,
    operands,
    weight_arguments,
    workers_of,
)
from .levels import Image, conv_level, gated_rows, pack_levels, rings_of_program, share_of_program
from .plan import Buffer, Case, Device, Launch, Plan
from .tiles import (
    Size,
    channels_of,
    columns_from,
    gelu,
    load_gates,
    ring_of,
    rounded,
    row_pointer,
    rows_from,
    rows_of,
    widened,
)

MAX_GATED_ROWS = tl.constexpr(2)  # of four levels no more fit into registers


@triton.jit(
    do_not_specialize=[
        "first_image", "images", "bands", "band_rows", "height", "width", "channel_units", "ctx_pitch", "gates_pitch",
        "store_agg",
    ]
)  # fmt: skip
def gated_aggregation_fwd_kernel(
    ctx,
    gates,
    w0,
    w1,
    w2,
    w3,
    agg,
    mean,
    rings,
    packed,
    first_image,
    images,
    bands,
    band_rows,
    height,
    width,
    channel_units,
    ctx_pitch,
    gates_pitch,
    store_agg,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    LAG: tl.constexpr,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    CHANNELS_ALIGN: tl.constexpr,
    CTX_ALIGN: tl.constexpr,
    GATES_ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """agg [images, H, W, C] and mean [images, bands, C] of the images from first_image on.

    A pitch counts from pixel to pixel, in units of ALIGN elements. RING0[l] is the first row of ring l in the
    program's scratch (in whole planes: its number). mean holds the band's share of the mean of ctx_L.
    """
    LEVELS: tl.constexpr = len(KH)
    size, C = Size(height, width), channel_units * CHANNELS_ALIGN
    share = share_of_program(C, BLOCK_C)
    own_rings = rings_of_program(rings, share.in_ring, size, RING0[LEVELS - 1], WHOLE_PLANE, BLOCK_C)
    packed += tl.program_id(0) * (TAP0[LEVELS] * BLOCK_C)
    pack_levels(packed, (w0, w1, w2, w3), share.channel0, C, KH, KW, TAP0, BLOCK_C)

    ctx_pixel = ctx_pitch * CTX_ALIGN
    gates_pixel = gates_pitch * GATES_ALIGN
    for trip in range(tl.cdiv(images * bands - share.worker, share.workers)):
        item = share.worker + trip * share.workers
        number = item // bands
        low = (item % bands) * band_rows
        high = tl.minimum(low + band_rows, height)
        plane = (first_image + number).to(tl.int64) * height * width
        ctx_plane = ctx + plane * ctx_pixel + share.channel0
        gates_plane = gates + plane * gates_pixel
        agg_plane = agg + number.to(tl.int64) * height * width * C + share.channel0
        image = Image(ctx_plane, ctx_pixel, gates_plane, gates_pixel, C, share.in_channels)

        total = aggregate_band(
            image, agg_plane, own_rings, packed, low, high, size, store_agg, KH, KW, TAP0, LAG, RING, RING0,
            WHOLE_PLANE, SCALE, ROWS, BLOCK_W, BLOCK_C,
        )  # fmt: skip
        mean_share = tl.sum(total, axis=0) / (height * width)
        tl.store(mean + item * C + share.own, mean_share, mask=share.own < C)
        if store_agg & (bands == 1):
            context = gelu(mean_share, tl.float32) * SCALE
            add_global(
                agg_plane, gates_plane + LEVELS, context, size, C, gates_pixel, share.own < C, BLOCK_C,
                gated_rows(ROWS, BLOCK_C, MAX_GATED_ROWS) * BLOCK_W,
            )  # fmt: skip


@triton.jit
def aggregate_band(
    image,
    agg_plane,
    rings,
    packed,
    low,
    high,
    size,
    store_agg,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    LAG: tl.constexpr,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """agg, but for the global level, of the rows from low to high; returns the sums of ctx_L, (BLOCK_W, BLOCK_C)."""
    LEVELS: tl.constexpr = len(KH)
    start = tl.maximum(low - LAG[LEVELS - 1], 0)
    steps = tl.cdiv(high - start + LAG[LEVELS - 1], ROWS)
    tiles = 1
    if WHOLE_PLANE:
        tiles = steps
        steps = 1
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for step in range(steps):
        for level in tl.static_range(LEVELS):
            # The rows of this level on which the band depends.
            first = tl.maximum(low - (LAG[LEVELS - 1] - LAG[level]), 0)
            end = tl.minimum(high + (LAG[LEVELS - 1] - LAG[level]), size.height)
            for tile in range(tiles):
                row0 = start + (step + tile) * ROWS - LAG[level]
                if (row0 < end) & (row0 + ROWS > first):
                    for column0 in range(0, size.width, BLOCK_W):
                        z = conv_level(
                            image, rings, packed, row0, column0, size, level, KH, KW, TAP0, RING, RING0,
                            WHOLE_PLANE, ROWS, BLOCK_W, BLOCK_C,
                        )  # fmt: skip
                        if level < LEVELS - 1:
                            keep_context(
                                z, rings, row0, column0, first, end, size, level, RING, RING0, WHOLE_PLANE,
                                ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
                        else:
                            total = gate_rows(
                                z, total, image, agg_plane, rings, row0, column0, first, end, size, store_agg,
                                RING, RING0, WHOLE_PLANE, SCALE, ROWS, BLOCK_W, BLOCK_C,
                            )  # fmt: skip
            tl.debug_barrier()
    return total


@triton.jit
def keep_context(
    z,
    rings,
    row0,
    column0,
    first,
    end,
    size,
    LEVEL: tl.constexpr,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """GELU(z) into the ring that the next level reads, of its rows from first to end."""
    rows, columns = rows_from(row0, ROWS, BLOCK_W), columns_from(column0, ROWS, BLOCK_W)
    inside = (rows >= first) & (rows < end) & (columns < size.width)
    ring = ring_of(rings, RING0[LEVEL], size, WHOLE_PLANE, BLOCK_C)
    target = row_pointer(ring.start, rows, ring.row_pitch, RING[LEVEL]) + (columns * BLOCK_C + channels_of(BLOCK_C))
    context = gelu(rows_of(z, 0, ROWS), ring.start.dtype.element_ty)
    tl.store(target, rounded(context, ring.start.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(
    z,
    total,
    image,
    agg_plane,
    rings,
    row0,
    column0,
    first,
    end,
    size,
    store_agg,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The last level: agg of some rows, gated from z and from the rings of the levels before. Returns
    total + ctx_L."""
    GATED_ROWS: tl.constexpr = gated_rows(ROWS, BLOCK_C, MAX_GATED_ROWS)
    LEVELS: tl.constexpr = len(RING)
    channels = channels_of(BLOCK_C)
    for part in tl.static_range(0, ROWS, GATED_ROWS):
        rows, columns = rows_from(row0 + part, GATED_ROWS, BLOCK_W), columns_from(column0, GATED_ROWS, BLOCK_W)
        inside = (rows >= first) & (rows < end) & (columns < size.width)
        context = gelu(rows_of(z, part, GATED_ROWS), agg_plane.dtype.element_ty)
        counted = tl.where(inside, context, 0.0)
        total += tl.sum(tl.reshape(counted, (GATED_ROWS, BLOCK_W, BLOCK_C)), axis=0)
        if store_agg:
            gate = load_gates(image.gates + (LEVELS - 1), rows, columns, size.width, image.gates_pixel, inside)
            sum = gate * context
            for level in tl.static_range(LEVELS - 1):
                ring = ring_of(rings, RING0[level], size, WHOLE_PLANE, BLOCK_C)
                source = row_pointer(ring.start, rows, ring.row_pitch, RING[level])
                source += columns * BLOCK_C + channels
                kept = widened(tl.load(source, mask=inside, other=0.0))
                gate = load_gates(image.gates + level, rows, columns, size.width, image.gates_pixel, inside)
                sum += gate * kept
            target = row_pointer(agg_plane, rows, size.width * image.channels, 0)
            target += columns * image.channels + channels
            here = inside & image.in_channels
            tl.store(target, rounded(sum * SCALE, agg_plane.dtype.element_ty), mask=here)
    return total


@triton.jit
def add_global(
    agg_plane,
    gates_plane,
    context,
    size,
    C,
    gates_pixel,
    in_channels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """agg += gate * context of the global level, over a plane whose agg was just written by the same program."""
    channels = tl.max_contiguous(tl.arange(0, BLOCK_C), 4)
    for first in range(0, size.height * size.width, 2 * BLOCK_P):
        for part in tl.static_range(2):
            pixels = (first + part * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = pixels < size.height * size.width
            here = inside[:, None] & in_channels[None, :]
            target = agg_plane + pixels[:, None] * C + channels[None, :]
            gate = tl.load(gates_plane + pixels * gates_pixel, mask=inside, other=0.0).to(tl.float32)
            local = widened(tl.load(target, mask=here, other=0.0))
            sum = local + gate[:, None] * context[None, :]
            tl.store(target, rounded(sum, agg_plane.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first_image", "bands", "positions", "gates_pitch"])
def add_global_kernel(
    agg,
    gates,
    mean,
    first_image,
    bands,
    positions,
    gates_pitch,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    GATES_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """agg += gate * GELU(mean) where a plane was worked in bands: only now is its mean known.

    One program owns BLOCK_P positions of an image and BLOCK_C channels.
    """
    image = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channels < C
    whole = tl.zeros((BLOCK_C,), tl.float32)
    for band in range(bands):
        whole += tl.load(mean + (image * bands + band) * C + channels, mask=in_channels, other=0.0)
    pixels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixels < positions
    gate_at = (first_image + image).to(tl.int64) * positions + pixels
    gate = tl.load(gates + gate_at * (gates_pitch * GATES_ALIGN) + LEVELS, mask=inside, other=0.0).to(tl.float32)
    target = agg + (image.to(tl.int64) * positions + pixels)[:, None] * C + channels[None, :]
    here = inside[:, None] & in_channels[None, :]
    local = widened(tl.load(target, mask=here, other=0.0))
    context = gelu(whole, tl.float32) * SCALE
    tl.store(target, rounded(local + gate[:, None] * context[None, :], agg.dtype.element_ty), mask=here)


# ---- plans ----------------------------------------------------------------------------------------------------------


def forward_plan(case: Case, device: Device, config: LevelConfig | None = None) -> Plan:
    """The launches of ``gated_aggregation`` forward: operands ctx, gates, w0..; output agg.

    ``Plan.launches`` lists them in order; `Launch.ast` gives what a compiler needs, `Plan.run` runs them.
    """
    config = config or level_config_of(case, device)
    agg = Buffer((case.batch, case.height, case.width, case.channels), case.dtype, is_output=True)
    launches, buffers, alive = forward_launches(case, device, config, 0, case.batch, agg_is_counted=False)
    return Plan(launches, {"agg": agg, **buffers}, operands(case), alive)


def forward_launches(
    case: Case,
    device: Device,
    config: LevelConfig,
    first_image: int,
    images: int,
    store_agg: bool = True,
    agg_is_counted: bool = True,
    chunk: int = 0,
) -> tuple[list[Launch], dict[str, Buffer], int]:
    """(launches, scratch, bytes alive at once) of some images; agg and mean hold those alone.

    ``chunk``: images of the largest launch of the call, for which the bands are chosen: one kernel serves all.
    A program reads its plane of agg back for the global level. ``agg_is_counted``: the caller counts agg among the
    bytes that must stay in the L2; otherwise the planes of agg are counted here.
    """
    heights = tuple(kh for kh, _ in case.kernel_sizes)
    timetable = schedule.forward(heights, config.rows, config.whole_plane)
    blocks = math.ceil(case.channels / config.block_c)
    bands = bands_of(case, device, config, max(images, chunk) * blocks)
    scratch_rows = timetable.rows_kept(case.height)
    ring_elements = scratch_rows * case.width * config.block_c
    own_bytes = ring_elements * case.dtype.itemsize + 4 * case.taps * config.block_c
    in_place = store_agg and bands == 1
    if in_place and not agg_is_counted:
        own_bytes += case.positions * config.block_c * case.dtype.itemsize
    mean = Buffer((images, bands, case.channels), torch.float32)
    workers = workers_of(device, config, images * bands, blocks)
    programs = workers * blocks
    launches = [
        Launch(
            gated_aggregation_fwd_kernel,
            (programs, 1, 1),
            {
                "ctx": "ctx",
                "gates": "gates",
                **weight_arguments(case),
                "agg": "agg" if store_agg else "rings",
                "mean": "mean",
                "rings": "rings",
                "packed": "packed",
                "first_image": first_image,
                "images": images,
                "bands": bands,
                "band_rows": math.ceil(case.height / bands),
                "height": case.height,
                "width": case.width,
                "store_agg": int(store_agg),
                **aligned_pitches(case),
            },
            {
                **level_constexprs(case, config),
                "LAG": timetable.lag,
                "RING": timetable.ring,
                "RING0": first_rows(timetable.ring[:-1], config),
                "SCALE": case.scale,
                **alignments(case),
            },
            config.num_warps,
            maxnreg=config.registers(config.rows),
        )
    ]
    if store_agg and bands > 1:
        launches.append(add_global_launch(case, first_image, images, bands))
    buffers = {
        "mean": mean,
        "rings": Buffer((programs, ring_elements), case.dtype),
        "packed": Buffer((programs, case.taps, config.block_c), torch.float32),
    }
    return launches, buffers, programs * own_bytes + mean.nbytes


def add_global_launch(case: Case, first_image: int, images: int, bands: int) -> Launch:
    block_p, block_c = 64, min(64, triton.next_power_of_2(case.channels))
    return Launch(
        add_global_kernel,
        (math.ceil(case.positions / block_p), math.ceil(case.channels / block_c), images),
        {
            "agg": "agg",
            "gates": "gates",
            "mean": "mean",
            "first_image": first_image,
            "bands": bands,
            "positions": case.positions,
            "gates_pitch": aligned_pitches(case)["gates_pitch"],
        },
        {
            "C": case.channels,
            "LEVELS": case.levels,
            "SCALE": case.scale,
            "GATES_ALIGN": alignments(case)["GATES_ALIGN"],
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
        },
        num_warps=4,
    )

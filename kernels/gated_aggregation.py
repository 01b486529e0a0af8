"""Gated aggregation, forward: all levels, gates and the global level in one launch.

    program p            owns BLOCK_C channels (block p % blocks) of the images worker, worker + workers, ...
    reads once           ctx [H, W, BLOCK_C], gates [H, W, L + 1], its weights, packed to float32 [taps, BLOCK_C]
    keeps in rings       ctx_1 .. ctx_{L-1}: global scratch of the program, a few rows each, in practice L1 and L2
    writes once          agg [H, W, BLOCK_C] (and again with the global level, from L2), or mean [BLOCK_C]
    barriers             one between any two levels of a step: a level reads neighbours that other threads wrote

Bytes: 2 C + (L + 1) C / BLOCK_C elements a position, against 2 C + L + 1 at least. Scratch is alive in as many
programs as are launched: the grid is as large as what stays on chip, and programs walk over the images.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import schedule
from .config import LevelConfig, level_config
from .plan import Buffer, Case, Device, Launch, Plan
from .tiles import (
    channels_of,
    columns_from,
    conv_tiles,
    gelu,
    load_gates,
    pack_weights,
    rounded,
    row_pointer,
    rows_from,
    rows_of,
)


@triton.jit
def pick(level: tl.constexpr, w0, w1, w2, w3):
    if level == 0:
        return w0
    elif level == 1:
        return w1
    elif level == 2:
        return w2
    else:
        return w3


@triton.jit
def ring_start(rings, FIRST: tl.constexpr, height, ring_row, WHOLE_PLANE: tl.constexpr):
    """A ring that starts at row FIRST of the program's scratch, or the plane of that number."""
    return rings + FIRST * (height if WHOLE_PLANE else 1) * ring_row


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
    # As many rows at once as a load of their gates takes less than one element a thread; of four levels no more fit.
    GATED_ROWS: tl.constexpr = min(ROWS, BLOCK_C // 8, 2)
    C = channel_units * CHANNELS_ALIGN
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    workers = tl.num_programs(0) // blocks
    worker = program // blocks
    channel0 = (program % blocks) * BLOCK_C
    channels = channels_of(BLOCK_C)
    in_channels = channel0 + channels < C
    own = channel0 + tl.arange(0, BLOCK_C)

    ring_row = width * BLOCK_C
    scratch_rows = RING0[LEVELS - 1] * (height if WHOLE_PLANE else 1)
    rings += program.to(tl.int64) * scratch_rows * ring_row
    packed += program * (TAP0[LEVELS] * BLOCK_C)
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
    for trip in range(tl.cdiv(images * bands - worker, workers)):
        item = worker + trip * workers
        image = item // bands
        low = (item % bands) * band_rows
        high = tl.minimum(low + band_rows, height)
        plane = (first_image + image).to(tl.int64) * height * width
        ctx_plane = ctx + plane * ctx_pixel + channel0
        gates_plane = gates + plane * gates_pixel
        agg_plane = agg + image.to(tl.int64) * height * width * C + channel0

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
                level_low = tl.maximum(low - (LAG[LEVELS - 1] - LAG[level]), 0)
                level_high = tl.minimum(high + (LAG[LEVELS - 1] - LAG[level]), height)
                for tile in range(tiles):
                    row0 = start + (step + tile) * ROWS - LAG[level]
                    if (row0 < level_high) & (row0 + ROWS > level_low):
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
                                    channels < BLOCK_C, RING[level - 1], KH[level], KW[level], False,
                                    ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            if level < LEVELS - 1:
                                rows = rows_from(row0, ROWS, BLOCK_W)
                                columns = columns_from(column0, ROWS, BLOCK_W)
                                inside = (rows >= level_low) & (rows < level_high) & (columns < width)
                                ring = ring_start(rings, RING0[level], height, ring_row, WHOLE_PLANE)
                                target = row_pointer(ring, rows, ring_row, RING[level]) + (
                                    columns * BLOCK_C + channels
                                )
                                context = gelu(rows_of(z, 0, ROWS))
                                tl.store(target, rounded(context, rings.dtype.element_ty), mask=inside)
                            else:
                                for part in tl.static_range(0, ROWS, GATED_ROWS):
                                    rows = rows_from(row0 + part, GATED_ROWS, BLOCK_W)
                                    columns = columns_from(column0, GATED_ROWS, BLOCK_W)
                                    inside = (rows >= level_low) & (rows < level_high) & (columns < width)
                                    context = gelu(rows_of(z, part, GATED_ROWS))
                                    counted = tl.where(inside, context, 0.0)
                                    total += tl.sum(tl.reshape(counted, (GATED_ROWS, BLOCK_W, BLOCK_C)), axis=0)
                                    if store_agg:
                                        gate = load_gates(
                                            gates_plane + level, rows, columns, width, gates_pixel, inside
                                        )
                                        sum = gate * context
                                        for earlier in tl.static_range(LEVELS - 1):
                                            ring = ring_start(rings, RING0[earlier], height, ring_row, WHOLE_PLANE)
                                            source = row_pointer(ring, rows, ring_row, RING[earlier])
                                            source += columns * BLOCK_C + channels
                                            kept = tl.load(source, mask=inside, other=0.0).to(tl.float32)
                                            gate = load_gates(
                                                gates_plane + earlier, rows, columns, width, gates_pixel, inside
                                            )
                                            sum += gate * kept
                                        target = row_pointer(agg_plane, rows, width * C, 0) + (columns * C + channels)
                                        here = inside & in_channels
                                        tl.store(target, rounded(sum * SCALE, agg.dtype.element_ty), mask=here)
                tl.debug_barrier()
        share = tl.sum(total, axis=0) / (height * width)
        tl.store(mean + item * C + own, share, mask=own < C)
        if store_agg & (bands == 1):
            add_global(
                agg_plane, gates_plane + LEVELS, gelu(share) * SCALE, height, width, C, gates_pixel, own < C,
                BLOCK_C, GATED_ROWS * BLOCK_W,
            )  # fmt: skip


@triton.jit
def add_global(
    agg_plane,
    gates_plane,
    context,
    height,
    width,
    C,
    gates_pixel,
    in_channels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """agg += gate * context of the global level, over a plane whose agg was just written by the same program."""
    channels = tl.max_contiguous(tl.arange(0, BLOCK_C), 4)
    for first in range(0, height * width, 2 * BLOCK_P):
        for part in tl.static_range(2):
            pixels = (first + part * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = pixels < height * width
            here = inside[:, None] & in_channels[None, :]
            target = agg_plane + pixels[:, None] * C + channels[None, :]
            gate = tl.load(gates_plane + pixels * gates_pixel, mask=inside, other=0.0).to(tl.float32)
            local = tl.load(target, mask=here, other=0.0).to(tl.float32)
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
    local = tl.load(target, mask=here, other=0.0).to(tl.float32)
    tl.store(target, rounded(local + gate[:, None] * (gelu(whole) * SCALE)[None, :], agg.dtype.element_ty), mask=here)


# ---- plans ----------------------------------------------------------------------------------------------------------


def forward_plan(case: Case, device: Device, config: LevelConfig | None = None) -> Plan:
    """The launches of ``gated_aggregation`` forward: operands ctx, gates, w0..; output agg.

    ``Plan.launches`` lists them in order; `Launch.ast` gives what a compiler needs, `Plan.run` runs them.
    """
    config = config or level_config(case.height, case.width, case.channels, case.kernel_heights, case.dtype)
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

    ``chunk``: images of the other launches of the call, if those have more: one kernel serves all. A program reads
    its plane of agg back for the global level, from the L2 if it fits there; who counts agg among its own scratch
    has seen to that.
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
    items = min(images * bands, workers_worth_their_weights(case, device, images, blocks))
    workers = workers_of(device, config, items, blocks, own_bytes, mean.nbytes)
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


def operands(case: Case) -> dict[str, torch.dtype]:
    return dict.fromkeys(("ctx", "gates", *(f"w{level}" for level in range(case.levels))), case.dtype)


def weight_arguments(case: Case) -> dict[str, str]:
    """w0 .. w3; a kernel with fewer levels never looks at the rest."""
    return {f"w{level}": f"w{min(level, case.levels - 1)}" for level in range(4)}


def alignment(pitch: int, dtype: torch.dtype) -> int:
    """The largest power of two, up to 16 bytes, that divides a pitch: how wide its loads can be, in elements."""
    return math.gcd(pitch, 16 // dtype.itemsize)


def aligned_pitches(case: Case) -> dict[str, int]:
    return {
        "channel_units": case.channels // alignment(case.channels, case.dtype),
        "ctx_pitch": case.ctx_pitch // alignment(case.ctx_pitch, case.dtype),
        "gates_pitch": case.gates_pitch // alignment(case.gates_pitch, case.dtype),
    }


def alignments(case: Case) -> dict[str, int]:
    return {
        "CHANNELS_ALIGN": alignment(case.channels, case.dtype),
        "CTX_ALIGN": alignment(case.ctx_pitch, case.dtype),
        "GATES_ALIGN": alignment(case.gates_pitch, case.dtype),
    }


def level_constexprs(case: Case, config: LevelConfig) -> dict[str, object]:
    first_taps = [0]
    for kh, kw in case.kernel_sizes:
        first_taps.append(first_taps[-1] + kh * kw)
    return {
        "KH": tuple(kh for kh, _ in case.kernel_sizes),
        "KW": tuple(kw for _, kw in case.kernel_sizes),
        "TAP0": tuple(first_taps),
        "WHOLE_PLANE": config.whole_plane,
        "BLOCK_C": config.block_c,
        "BLOCK_W": config.block_w,
        "ROWS": config.rows,
    }


def first_rows(rings: tuple[int, ...], config: LevelConfig) -> tuple[int, ...]:
    """Where each ring starts, in rows; in whole planes, which plane it is. The last entry is the end."""
    starts = [0]
    for ring in rings:
        starts.append(starts[-1] + (1 if config.whole_plane else ring))
    return tuple(starts)


def workers_of(
    device: Device, config: LevelConfig, items: int, blocks: int, own_bytes: int, shared_bytes: int = 0
) -> int:
    """Programs for each block of channels: as many as are resident at once and keep their scratch on chip."""
    resident = config.programs_per_sm * device.sm_count
    on_chip = (device.on_chip_bytes - shared_bytes) // max(own_bytes, 1)
    # Half the processors at least: scratch that leaves the L2 costs less than processors that idle.
    programs = max(min(resident, on_chip), device.sm_count // 2)
    return max(1, min(items, programs // blocks))


def workers_worth_their_weights(case: Case, device: Device, images: int, blocks: int) -> int:
    """Each program reads its weights once: beyond one a processor, only as many as pass ten times as many bytes by."""
    return max(1, device.sm_count // blocks, images * case.positions // (5 * case.taps))


def bands_of(case: Case, device: Device, config: LevelConfig, planes: int) -> int:
    """Bands of rows for each plane. More than one, at the price of halos, where planes are too few for the device."""
    if config.whole_plane or 2 * planes > device.sm_count or planes == 0:
        return 1
    halo = sum(kh // 2 for kh, _ in case.kernel_sizes)
    largest = case.height // max(2 * halo, 2 * config.rows)
    return max(1, min(largest, device.sm_count // planes))

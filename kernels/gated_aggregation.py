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
from .tiles import columns_of_row, conv_tiles, gelu, pack_weights, rounded, row_pointer


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


@triton.jit(
    do_not_specialize=["first_image", "images", "bands", "band_rows", "height", "width", "ctx_pitch", "gates_pitch"]
)
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
    ctx_pitch,
    gates_pitch,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAP0: tl.constexpr,
    LAG: tl.constexpr,
    RING: tl.constexpr,
    RING0: tl.constexpr,
    WHOLE_PLANE: tl.constexpr,
    SCALE: tl.constexpr,
    STORE_AGG: tl.constexpr,
    GLOBAL_IN_PLACE: tl.constexpr,
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
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    workers = tl.num_programs(0) // blocks
    worker = program // blocks
    channel0 = (program % blocks) * BLOCK_C
    channels = tl.arange(0, BLOCK_C)
    in_channels = channel0 + channels < C

    scratch_rows = RING0[LEVELS - 1] * (height if WHOLE_PLANE else 1)
    rings += program.to(tl.int64) * scratch_rows * width * BLOCK_C
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
                            columns = column0 + tl.arange(0, BLOCK_W)
                            offsets = columns[:, None] * BLOCK_C + channels[None, :]
                            if level == 0:
                                z = conv_tiles(
                                    ctx_plane, width * ctx_pixel, ctx_pixel, packed, row0, column0, height, width,
                                    in_channels, 0, KH[0], KW[0], False, ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            else:
                                ring_rows = RING0[level - 1] * (height if WHOLE_PLANE else 1)
                                z = conv_tiles(
                                    rings + ring_rows * width * BLOCK_C, width * BLOCK_C, BLOCK_C,
                                    packed + TAP0[level] * BLOCK_C, row0, column0, height, width,
                                    channels < BLOCK_C, RING[level - 1], KH[level], KW[level], False,
                                    ROWS, BLOCK_W, BLOCK_C,
                                )  # fmt: skip
                            for r in tl.static_range(ROWS):
                                row = row0 + r
                                inside = columns_of_row(columns, row, level_low, level_high, width)
                                context = gelu(z[r])
                                if level < LEVELS - 1:
                                    ring_rows = RING0[level] * (height if WHOLE_PLANE else 1)
                                    ring = rings + ring_rows * width * BLOCK_C
                                    target = row_pointer(ring, row, width * BLOCK_C, RING[level]) + offsets
                                    tl.store(target, rounded(context, rings.dtype.element_ty), mask=inside[:, None])
                                else:
                                    total += tl.where(inside[:, None], context, 0.0)
                                    if STORE_AGG:
                                        gate_row = gates_plane + row.to(tl.int64) * width * gates_pixel
                                        gate_at = gate_row + columns * gates_pixel
                                        gate = tl.load(gate_at + level, mask=inside, other=0.0).to(tl.float32)
                                        sum = gate[:, None] * context
                                        for earlier in tl.static_range(LEVELS - 1):
                                            ring_rows = RING0[earlier] * (height if WHOLE_PLANE else 1)
                                            ring = rings + ring_rows * width * BLOCK_C
                                            source = row_pointer(ring, row, width * BLOCK_C, RING[earlier]) + offsets
                                            context = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
                                            gate = tl.load(gate_at + earlier, mask=inside, other=0.0).to(tl.float32)
                                            sum += gate[:, None] * context
                                        target = agg_plane + row.to(tl.int64) * width * C
                                        target += columns[:, None] * C + channels[None, :]
                                        here = inside[:, None] & in_channels[None, :]
                                        tl.store(target, rounded(sum * SCALE, agg.dtype.element_ty), mask=here)
                tl.debug_barrier()
        share = tl.sum(total, axis=0) / (height * width)
        tl.store(mean + item * C + channel0 + channels, share, mask=in_channels)
        if GLOBAL_IN_PLACE:
            add_global(
                agg_plane, gates_plane + LEVELS, gelu(share) * SCALE, height, width, gates_pixel, in_channels,
                C, BLOCK_C, BLOCK_W,
            )  # fmt: skip


@triton.jit
def add_global(
    agg_plane,
    gates_plane,
    context,
    height,
    width,
    gates_pixel,
    in_channels,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """agg += gate * context of the global level, over a plane whose agg was just written by the same program."""
    channels = tl.arange(0, BLOCK_C)
    for first in range(0, height * width, 4 * BLOCK_W):
        for part in tl.static_range(4):
            pixels = (first + part * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
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
    config = config or level_config(case.height, case.width, case.channels)
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
    workers = workers_of(device, config, images * bands, blocks, own_bytes, mean.nbytes)
    programs = workers * blocks
    launches = [
        Launch(
            gated_aggregation_fwd_kernel,
            (programs, 1, 1),
            {
                "ctx": "ctx",
                "gates": "gates",
                **weight_arguments(case),
                "agg": "agg" if store_agg else "mean",
                "mean": "mean",
                "rings": "rings",
                "packed": "packed",
                "first_image": first_image,
                "images": images,
                "bands": bands,
                "band_rows": math.ceil(case.height / bands),
                "height": case.height,
                "width": case.width,
                **aligned_pitches(case),
            },
            {
                **level_constexprs(case, config),
                "LAG": timetable.lag,
                "RING": timetable.ring,
                "RING0": first_rows(timetable.ring[:-1], config),
                "SCALE": case.scale,
                "STORE_AGG": store_agg,
                "GLOBAL_IN_PLACE": in_place,
                **alignments(case),
            },
            config.num_warps,
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
        "ctx_pitch": case.ctx_pitch // alignment(case.ctx_pitch, case.dtype),
        "gates_pitch": case.gates_pitch // alignment(case.gates_pitch, case.dtype),
    }


def alignments(case: Case) -> dict[str, int]:
    return {
        "CTX_ALIGN": alignment(case.ctx_pitch, case.dtype),
        "GATES_ALIGN": alignment(case.gates_pitch, case.dtype),
    }


def level_constexprs(case: Case, config: LevelConfig) -> dict[str, object]:
    first_taps = [0]
    for kh, kw in case.kernel_sizes:
        first_taps.append(first_taps[-1] + kh * kw)
    return {
        "C": case.channels,
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


def bands_of(case: Case, device: Device, config: LevelConfig, planes: int) -> int:
    """Bands of rows for each plane. More than one, at the price of halos, where planes are too few for the device."""
    if config.whole_plane or 2 * planes > device.sm_count or planes == 0:
        return 1
    halo = sum(kh // 2 for kh, _ in case.kernel_sizes)
    largest = case.height // max(2 * halo, 2 * config.rows)
    return max(1, min(largest, device.sm_count // planes))

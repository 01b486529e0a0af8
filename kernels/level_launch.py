"""What launches of the level kernels share, forward and backward: their arguments, and how many programs there are.

Triton's launcher wants every tensor and number as an argument of its own, so the kernels' lists are long. They have
one order: tensors read, tensors written, scratch; numbers (first image, images, bands, the map's size, pitches); then
constants, in groups: the levels (KH, KW, TAP0), the timetable (LAG.., RING.., RING0, WHOLE_PLANE), what is asked for
(SCALE, NEED_..), alignments, and the tile (BLOCK_C, BLOCK_W, ROWS, STEP). A kernel's first lines group them for the
device functions.
"""

from __future__ import annotations

import math

import torch

from .launch_table import LevelConfig, level_config
from .plan import Case, Device


def operands(case: Case) -> dict[str, torch.dtype]:
    return dict.fromkeys(("ctx", "gates", *(f"w{level}" for level in range(case.levels))), case.dtype)


def weight_arguments(case: Case) -> dict[str, str]:
    """w0 .. w3; a kernel of fewer levels does not read the last ones, which stand for its last level's."""
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


def level_config_of(case: Case, device: Device) -> LevelConfig:
    """The tables' choice for a call."""
    return level_config(case.height, case.width, case.channels, case.kernel_heights, case.dtype, case.batch, device)


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


def workers_of(device: Device, config: LevelConfig, items: int, blocks: int) -> int:
    """Programs a block of channels: as many as are resident at once, but no more than there are planes or bands."""
    return max(1, min(items, config.programs_per_sm * device.sm_count // blocks))


def bands_of(case: Case, device: Device, config: LevelConfig, planes: int) -> int:
    """Bands of rows that each plane is cut into: one, or more where there are fewer planes than half the processors.

    A program of one plane works as long as its rows and its halo are high: bands make that less, although the halo is
    worked twice, as long as there are processors without a program.
    """
    if config.bands:
        return 1 if config.whole_plane else min(config.bands, case.height)
    if config.whole_plane or 2 * planes > device.sm_count or planes == 0:
        return 1
    return max(1, min(case.height // config.rows, device.sm_count // planes))

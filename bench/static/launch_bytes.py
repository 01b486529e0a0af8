"""Bytes that a launch passes through the L2, and those of them that memory has to move.

`passes` lists for each tensor of a launch how often its bytes cross the L2; the docstrings of the kernels say why. The
interpreter counts the same bytes address by address (bytes_moved.py); this list needs no run, and a test compares the
two. Operands come from memory once and outputs go there once; scratch stays in the L2 if all that is alive fits. The
slabs of a product read a row at about the same time, so it comes from memory once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from focalnet.kernels.plan import Case, Device, Launch, Plan


@dataclass(frozen=True)
class Bytes:
    """Through the L2, and from or to memory."""

    l2: float
    memory: float


def bytes_of(launch: Launch, plan: Plan, case: Case, device: Device) -> Bytes:
    fits = plan.alive_bytes <= device.on_chip_bytes
    l2 = memory = 0.0
    for name, (nbytes, times) in passes(launch, plan, case).items():
        l2 += nbytes * times
        tensor = launch.arguments[name]
        stays = tensor in plan.buffers and not plan.buffers[str(tensor)].is_output
        again = times if stays and launch.name.startswith("gated_aggregation") else 1
        memory += 0 if stays and fits else nbytes * again
    return Bytes(l2, memory)


def ring_bytes(launch: Launch, plan: Plan) -> int:
    """Of the scratch that all programs of a launch keep for themselves at once."""
    own = [name for name in launch.arguments.values() if name in ("rings", "back_rings", "packed", "back_packed")]
    return sum(plan.buffers[str(name)].nbytes for name in own)


def passes(launch: Launch, plan: Plan, case: Case) -> dict[str, tuple[float, float]]:
    """(bytes, times they cross the L2) of each tensor argument."""
    if launch.name.startswith("gated_aggregation"):
        return _of_levels(launch, plan, case)
    if "PRECISION" in launch.constexprs:
        return _of_products(launch, case)
    if launch.name == "add_global_kernel":
        plane = launch.grid[2] * case.positions * case.dtype.itemsize
        return {"agg": (plane * case.channels, 2), "gates": (plane, launch.grid[1])}
    return _of_sums(launch, plan)


def _of_levels(launch: Launch, plan: Plan, case: Case) -> dict[str, tuple[float, float]]:
    numbers, size, levels = launch.arguments, case.dtype.itemsize, case.levels
    positions = int(numbers["images"]) * case.positions
    plane, gates = positions * case.channels * size, positions * (levels + 1) * size
    programs = math.prod(launch.grid)
    blocks = math.ceil(case.channels / int(str(launch.constexprs["BLOCK_C"])))
    weights = case.taps * case.channels * (size + 8) * programs / blocks
    bands = int(numbers["bands"])
    if launch.name == "gated_aggregation_fwd_kernel":
        halo = 2 * sum(kh // 2 for kh in case.kernel_heights)
        band_rows = int(numbers["band_rows"])
        again = min(band_rows + halo, case.height) / band_rows if bands > 1 else 1
        stored = int(numbers["store_agg"])
        return {
            "ctx": (plane, again),
            "gates": (gates, blocks * stored * (2 if bands == 1 else 1)),
            "agg": (plane * stored, 3 if bands == 1 else 1),
            "rings": (plane * (levels - 1), 2 * again),
            "packed": (weights, 1),
        }
    # The global level reads dagg, every level upwards and all but the first downwards; slopes are written, read, and
    # become gradients that dW and the level below read.
    return {
        "dagg": (plane, 2 * levels),
        "ctx": (plane, 2),
        "gates": (gates, 2 * blocks),
        "dctx": (plane, 1),
        "dgates": (positions * (levels + 1) * 4, blocks),
        "back_rings": (plane * (2 * levels - 1), 3),
        "back_packed": (weights, 1),
    }


def _of_products(launch: Launch, case: Case) -> dict[str, tuple[float, float]]:
    size, rows = case.dtype.itemsize, int(launch.arguments["row_count"])
    plane, channels = rows * case.channels * size, case.channels
    slabs = math.ceil(channels / int(str(launch.constexprs["BLOCK_N"])))
    if launch.name == "dweight_kernel":
        tall = math.ceil(channels / int(str(launch.constexprs["BLOCK_M"])))
        return {"dm": (plane, slabs), "agg": (plane, tall), "partial": (4 * channels**2 * launch.grid[1], 2)}
    weight = (channels**2 * size, launch.grid[0] / slabs)
    if launch.name == "dagg_kernel":
        return {"dm": (plane, slabs), "weight": weight, "dagg": (plane, 1)}
    if launch.name == "modulator_fwd_kernel":
        return {"agg": (plane, slabs), "weight": weight, "q": (plane, 1), "out": (plane, 1)}
    flags = launch.constexprs
    return {
        "agg": (plane, slabs * bool(flags["NEED_Q"])),
        "weight": weight,
        "q": (plane, 1),
        "dout": (plane, 1),
        "dq": (plane, float(bool(flags["NEED_Q"]))),
        "dm": (plane, float(bool(flags["NEED_M"]))),
    }


def _of_sums(launch: Launch, plan: Plan) -> dict[str, tuple[float, float]]:
    numbers, types = launch.arguments, plan.dtype_of()
    size = types[str(numbers["out"])].itemsize
    if launch.name == "sum_partials_kernel":
        elements, parts = int(numbers["elements"]), int(numbers["parts"])
        return {"partial": (4 * elements * parts, 1), "out": (size * elements, 1)}
    elements = int(numbers["channels"]) * int(numbers["taps"])
    return {"dfocal": (4 * elements * int(numbers["workers"]), 1), "out": (size * elements, 1)}

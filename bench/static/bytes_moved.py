"""Counts the bytes that the Triton kernels move at each stage, and compares them with the minimum.

    TRITON_INTERPRET=1 python bench/static/bytes_moved.py [--variant tiny_lrf ...]

A program's bytes are the distinct bytes of each tensor that it touches, summed over programs. Weights, which every
program reads, come from memory once and from the L2 after that. Scratch is counted apart: its bytes go through memory
only if all of it that is alive at once takes more than 60 percent of the L2. The time of a launch, not these bytes
alone, decides how work is divided: see performance_model.py.

The interpreter counts the launches in the plan of the stage, with their tiles and channels, but on a small map and one
image. The result is then scaled to the stage: bytes of tensors with positions grow with the positions, bytes of
weights do not (a test checks this). If planes are cut into bands, which read halos, programs of the stage's own launch
are counted.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from focalnet.kernels import focal_modulation, gated_aggregation, gated_aggregation_bwd
from focalnet.kernels.level_launch import level_config_of
from focalnet.kernels.operators import PLANS
from focalnet.kernels.plan import H100, Case, Device, Launch, Plan
from rich.console import Console
from rich.table import Table
from traffic import Counter

from focalnet.benchmark.environment import commit, versions
from focalnet.benchmark.floors import OPERATORS, Stage, stages, work
from focalnet.benchmark.rows import NOWHERE, write

VARIANTS = ("tiny_lrf", "base_lrf", "large_fl3", "large_fl4")
SMALL = (8, 16)  # rows and columns: whole tiles of every product
SAMPLE = 3  # programs of a launch that cuts planes into bands, whose halos differ at the rim

console = Console()


@dataclass(frozen=True)
class Moved:
    """Bytes of one call: of operands and outputs, by tensor and in whole sectors; of scratch that leaves the chip; of
    all scratch that is alive at once."""

    by_tensor: dict[str, float]
    sectors: float
    scratch: float
    alive: int
    budget: int

    @property
    def bytes(self) -> float:
        return sum(self.by_tensor.values())


def case_of(operator: str, stage: Stage, batch: int, dtype: torch.dtype) -> Case:
    """As a model calls it: views of one padded projection, bias, every gradient asked for, the first three packed."""
    mask = {"gated_aggregation_bwd": 3, "focal_modulation_bwd": 6}.get(operator, 0) * (True,)
    has_bias = operator.startswith("focal_modulation")
    case = Case.packed(
        batch, stage.height, stage.width, stage.channels, stage.kernels, dtype, has_bias=has_bias, mask=mask
    )
    return replace(case, gradient_pitch=case.q_pitch) if operator == "focal_modulation_bwd" else case


def plan_of(operator: str, case: Case, device: Device = H100) -> Plan:
    """The launches of one call of an operator of `floors.OPERATORS`."""
    return PLANS[operator](case, device)


def moved(operator: str, stage: Stage, batch: int, dtype: torch.dtype, device: Device = H100) -> Moved:
    case = case_of(operator, stage, batch, dtype)
    plan = plan_of(operator, case, device)
    small_case, small = small_plan(operator, case, device)
    counts = {kind_of(launch): count(launch, small, small_case) for launch in small.launches}
    alive = alive_bytes(plan, case)
    by_tensor: dict[str, float] = defaultdict(float)
    sectors = scratch = 0.0
    for launch in plan.launches:
        banded = kind_of(launch) not in counts
        touched_by = count(launch, plan, case) if banded else counts[kind_of(launch)]
        for argument, touched in touched_by.items():
            name = launch.arguments[argument]
            loads, stores = goes_to_memory(name, plan, fits=True)
            times = math.prod(launch.grid) if banded else repeats(launch, name, case)
            by_tensor[name] += times * (loads * touched.loaded + stores * touched.stored)
            sectors += times * (loads * touched.loaded_sectors + stores * touched.stored_sectors)
            if name in plan.buffers and alive > device.on_chip_bytes:
                scratch += times * ((not loads) * touched.loaded + (not stores) * touched.stored)
    for name, nbytes in weight_bytes(case).items():
        if name in by_tensor:
            sectors -= max(0.0, by_tensor[name] - nbytes)
            by_tensor[name] = min(by_tensor[name], nbytes)
    return Moved(dict(by_tensor), sectors, scratch, alive, device.on_chip_bytes)


def weight_bytes(case: Case) -> dict[str, int]:
    """Bytes of the weights: small enough to stay in the L2 once they have been read."""
    elements = {f"w{level}": case.channels * kh * kw for level, (kh, kw) in enumerate(case.kernel_sizes)}
    elements |= {"weight": case.channels**2, "bias": case.channels}
    return {name: count * case.dtype.itemsize for name, count in elements.items()}


def goes_to_memory(name: str, plan: Plan, fits: bool) -> tuple[bool, bool]:
    """Whether loads and stores of a tensor leave the chip.

    Operands are loaded from memory and outputs stored to it. What the operator wrote itself, it reads back from the L2
    if what is alive ``fits`` there.
    """
    if name not in plan.buffers:
        return True, True
    return not fits, plan.buffers[name].is_output or not fits


def alive_bytes(plan: Plan, case: Case) -> int:
    """What the plan says is alive at once; at least the scratch and the planes, still to be read back, of a launch."""

    def of(launch: Launch) -> int:
        made = {name: plan.buffers[name] for name in launch.arguments.values() if name in plan.buffers}
        scratch = sum(buffer.nbytes for buffer in made.values() if not buffer.is_output)
        if adds_global_itself(launch) and plan.buffers["agg"].is_output:
            plane = case.positions * launch.constexprs["BLOCK_C"] * case.dtype.itemsize
            scratch += math.prod(launch.grid) * plane
        return scratch

    return max(plan.alive_bytes, *map(of, plan.launches))


def adds_global_itself(launch: Launch) -> bool:
    """Whether a program reads back the plane of agg that it wrote: it has all of it, and so its mean."""
    return bool(launch.arguments.get("store_agg")) and launch.arguments["bands"] == 1


# ---- one program of each kind of launch -----------------------------------------------------------------------------


@dataclass
class Touched:
    """Bytes that one program loads from and stores to a tensor, and the same in whole sectors."""

    loaded: float = 0
    stored: float = 0
    loaded_sectors: float = 0
    stored_sectors: float = 0


def small_plan(operator: str, case: Case, device: Device) -> tuple[Case, Plan]:
    """The plan of one image of a small map, in the tiles of the large one."""
    config = level_config_of(case, device)
    with contextlib.ExitStack() as patches:
        for module in (gated_aggregation, gated_aggregation_bwd, focal_modulation):
            patches.enter_context(patch.object(module, "level_config_of", lambda *_: config))
        small = replace(case, batch=1, height=SMALL[0], width=SMALL[1])
        return small, plan_of(operator, small, device)


# Neither changes which addresses of its channels a program of the levels touches: so one count serves many stages.
_IMMATERIAL = {"C", "SCALE", "ACCUMULATE"}
_IMMATERIAL |= {"CHANNELS_ALIGN", "CTX_ALIGN", "GATES_ALIGN", "Q_ALIGN", "DCTX_ALIGN", "DQ_ALIGN"}
# Numbers that do change it.
_MATERIAL = ("channels", "taps", "tap0", "all_taps", "block_c")


def kind_of(launch: Launch) -> tuple:
    """What is alike in the launches of all chunks, maps and, for the levels, channels."""
    immaterial = _IMMATERIAL if "BLOCK_W" in launch.constexprs else _IMMATERIAL - {"C"}
    constexprs = tuple((name, value) for name, value in launch.constexprs.items() if name not in immaterial)
    # One tensor may stand for another that is not wanted.
    given = [name for name in launch.arguments.values() if isinstance(name, str)]
    numbers = tuple(launch.arguments.get(name) for name in _MATERIAL)
    return launch.name, tuple(given.index(name) for name in given), constexprs, numbers, adds_global_itself(launch)


_counted: dict[tuple, dict[str, Touched]] = {}


def count(launch: Launch, plan: Plan, case: Case) -> dict[str, Touched]:
    """What a program of a launch touches, by argument: the mean over all of a few, else of a sample."""
    key = (kind_of(launch), case.dtype, case.batch * case.positions)
    if key not in _counted:
        programs = math.prod(launch.grid)
        is_product, is_banded = "weight" in launch.arguments, launch.arguments.get("bands", 1) > 1
        sample = programs if is_product and programs <= 64 else SAMPLE if is_banded else 1
        _counted[key] = _count(launch, tensors_of(plan, launch, case), sample)
    return _counted[key]


def _count(launch: Launch, tensors: dict[str, torch.Tensor], sample: int) -> dict[str, Touched]:
    arguments = {name: tensors.get(value, value) for name, value in launch.arguments.items()}
    counter = Counter(dict(tensors), programs=sample)
    with counter.watching():
        launch.kernel[launch.grid](**arguments, **launch.constexprs, num_warps=launch.num_warps)
    (traffic,) = counter.launches
    if traffic.hazards:
        raise RuntimeError("\n".join(str(hazard) for hazard in traffic.hazards))
    names = {value: name for name, value in reversed(launch.arguments.items())}
    found = {names[name]: Touched() for name in {**traffic.loaded, **traffic.stored}}
    for field in ("loaded", "stored", "loaded_sectors", "stored_sectors"):
        for name, bytes_ in getattr(traffic, field).items():
            setattr(found[names[name]], field, bytes_ / traffic.programs)
    return found


def tensors_of(plan: Plan, launch: Launch, case: Case) -> dict[str, torch.Tensor]:
    """Every tensor that a launch names, each a storage of its own. Never filled: only addresses matter."""
    positions, channels = case.batch * case.positions, case.channels
    elements = {
        "ctx": positions * case.ctx_pitch,
        "gates": positions * case.gates_pitch,
        "q": positions * case.q_pitch,
    }
    elements |= dict.fromkeys(("dq", "dctx", "dgates"), positions * case.gradient_pitch)
    elements |= {"weight": channels**2, "bias": channels, "dagg": positions * channels, "dout": positions * channels}
    elements |= {f"w{level}": channels * kh * kw for level, (kh, kw) in enumerate(case.kernel_sizes)}
    elements |= {name: math.prod(buffer.shape) for name, buffer in plan.buffers.items()}
    types = plan.dtype_of()
    return {
        name: torch.empty(elements[name], dtype=types[name])
        for name in launch.arguments.values()
        if isinstance(name, str)
    }


def repeats(launch: Launch, name: str, case: Case) -> float:
    """How many times a launch touches what one program touched on the small map."""
    if name in per_program(case):
        return math.prod(launch.grid)
    if "images" in launch.arguments:
        positions, channels = launch.arguments["images"] * case.positions, launch.constexprs["BLOCK_C"]
    elif "weight" in launch.arguments:
        positions, channels = launch.arguments["row_count"], launch.constexprs["BLOCK_N"]
    else:
        return math.prod(launch.grid)
    return positions / math.prod(SMALL) * math.ceil(case.channels / channels)


def per_program(case: Case) -> set[str]:
    """What a program that walks over images or rows touches once: its weights, and sums over all that it passes."""
    once = {"weight", "bias", "dbias_parts", "packed", "back_packed", "dfocal"}
    return once | {f"w{level}" for level in range(case.levels)}


# ---- the table ------------------------------------------------------------------------------------------------------


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = [*VARIANTS],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16, float16.")] = ["bfloat16"],  # noqa: B006
) -> None:
    """Count, print a table for each variant, and write the rows."""
    for name in variant:
        for type_name in dtype:
            rows = [
                row(operator, stage, batch, getattr(torch, type_name))
                for stage in stages(name)
                for operator in OPERATORS
            ]
            show(rows)
            write(rows, "bytes_moved", NOWHERE)


def row(operator: str, stage: Stage, batch: int, dtype: torch.dtype) -> dict:
    found, least = moved(operator, stage, batch, dtype), work(operator, stage, batch, dtype).bytes
    return {
        "case": "bytes moved",
        "operator": operator,
        "variant": stage.variant,
        "stage": stage.index + 1,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [batch, stage.height, stage.width, stage.channels],
        "kernels": list(stage.kernels),
        "planned_for": "NVIDIA H100",
        "least_bytes": least,
        "bytes": found.bytes,
        "ratio": found.bytes / least,
        "sectors_ratio": found.sectors / least,
        "scratch_ratio": found.scratch / least,
        "alive_bytes": found.alive,
        "on_chip_bytes": found.budget,
        "commit": commit(),
        **versions(),
    }


def show(rows: list[dict]) -> None:
    first = rows[0]
    table = Table(title=f"{first['variant']}, batch {first['batch']}, {first['dtype']}: bytes over the least possible")
    for column in ("map", "operator"):
        table.add_column(column, no_wrap=True)
    for column in ("MB", "ratio", "sectors", "scratch", "alive"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in rows:
        table.add_row(
            f"{found['shape'][1]}² x {found['shape'][3]}",
            found["operator"],
            f"{found['least_bytes'] / 1e6:.1f}",
            f"{found['ratio']:.3f}",
            f"{found['sectors_ratio']:.2f}",
            f"{found['scratch_ratio']:.2f}",
            f"{found['alive_bytes'] / 2**20:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

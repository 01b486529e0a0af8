"""Lists every launch that the configuration table can choose for the published models.

The 15 variants at their published sizes, batch 1 and 128, and detection: models at 800 x 1333, with published windows
and with kernels up to 15; all three dtypes; forward and backward of both operators, every gradient asked for. Launches
that compile to the same code are one, and so are, for the kernels of the levels, those that differ in the number of
channels alone: it enters addresses and nothing else, tiles and loops are the same. For GPUs with 99 KB of shared
memory: one launch of every tile of the products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bytes_moved import case_of, plan_of
from compiled import Pointer
from focalnet.kernels.launch_table import backward_would_spill
from focalnet.kernels.plan import A100, B200, H100, RTX_3090, RTX_4090, RTX_5090, Device, Launch

from focalnet.benchmark.floors import OPERATORS, Stage, stages
from focalnet.variants import VARIANTS

DEVICES = {80: A100, 86: RTX_3090, 89: RTX_4090, 90: H100, 100: B200, 120: RTX_5090}
# Of the others only the tiles of products are listed, which must fit into 99 KB of shared memory.
COMPLETE = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DETECTION = (800, 1333)
# (variant, first window): published detectors use 3 and 5; 9 gives kernels up to 15.
DETECTORS = (("tiny_lrf", 3), ("base_srf", 9), ("base_lrf", 9), ("large_fl4", 3), ("xlarge_fl4", 9))


def published() -> Iterator[tuple[Stage, int]]:
    """(stage, batch) of everything."""
    for name in VARIANTS:
        for batch in (1, 128):
            yield from ((stage, batch) for stage in stages(name))
    for name, window in DETECTORS:
        yield from ((stage, 1) for stage in stages(name, DETECTION, window))


def launches(arch: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[tuple, tuple[Launch, dict]]:
    """Launches by what decides the compiled code, with the dtypes of their tensors."""
    device: Device = DEVICES[arch]
    found: dict[tuple, tuple[Launch, dict]] = {}
    for stage, batch in published():
        for dtype in dtypes:
            for operator in OPERATORS:
                if operator.endswith("_bwd") and backward_would_spill(stage.kernels, dtype):
                    continue  # the backend refuses it
                plan = plan_of(operator, case_of(operator, stage, batch, dtype), device)
                types = plan.dtype_of()
                for launch in plan.launches:
                    key = key_of(launch, types) if arch in COMPLETE else tile_of(launch, types)
                    if key is not None:
                        found.setdefault(key, (launch, types))
    return found


def key_of(launch: Launch, types: dict[str, torch.dtype]) -> tuple:
    """Kernel, dtypes, constants and warps: what the compiler sees."""
    arguments = tuple(types.get(value, "number") for value in launch.arguments.values())
    immaterial = {"C", "SCALE"} if "PRECISION" not in launch.constexprs else set()
    constants = tuple((name, value) for name, value in launch.constexprs.items() if name not in immaterial)
    return launch.name, arguments, constants, launch.num_warps, launch.num_stages


def tile_of(launch: Launch, types: dict[str, torch.dtype]) -> tuple | None:
    """What the shared memory of a product depends on; None for what is no product."""
    if "PRECISION" not in launch.constexprs:
        return None
    blocks = tuple(launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return launch.name, types[next(iter(launch.arguments.values()))], blocks, launch.num_warps, launch.num_stages


def arguments_of(launch: Launch, types: dict[str, torch.dtype]) -> dict:
    """For `compiled.compile_launch`: tensors as pointers aligned to 16 bytes, as allocations and padding make them."""
    given = {name: Pointer(types[v]) if isinstance(v, str) else v for name, v in launch.arguments.items()}
    return given | launch.constexprs

"""Lists every launch that the configuration table can choose for the published models.

These are the 15 variants at their published sizes with batch 1 and 128, and detection models at 800 x 1333 with
published windows and with kernels up to 15. All have three dtypes, and forward and backward of both operators with
every gradient. Launches that compile to the same code are listed once. For kernels of the levels this includes
launches that differ only in the number of channels, which affects addresses but not tiles and loops.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bytes_moved import case_of, plan_of
from compiled import Pointer
from focalnet.kernels.plan import A100, B200, H100, Device, Launch

from focalnet.benchmark.floors import OPERATORS, Stage, stages
from focalnet.variants import VARIANTS

DEVICES = {80: A100, 90: H100, 100: B200}
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
                plan = plan_of(operator, case_of(operator, stage, batch, dtype), device)
                types = plan.dtype_of()
                for launch in plan.launches:
                    found.setdefault(key_of(launch, types), (launch, types))
    return found


def key_of(launch: Launch, types: dict[str, torch.dtype]) -> tuple:
    """Kernel, dtypes, constants and warps: what the compiler sees."""
    arguments = tuple(types.get(value, "number") for value in launch.arguments.values())
    immaterial = {"C", "SCALE"} if "PRECISION" not in launch.constexprs else set()
    constants = tuple((name, value) for name, value in launch.constexprs.items() if name not in immaterial)
    return launch.name, arguments, constants, launch.num_warps, launch.num_stages


def arguments_of(launch: Launch, types: dict[str, torch.dtype]) -> dict:
    """For `compiled.compile_launch`: tensors as pointers aligned to 16 bytes, as allocations and padding make them."""
    given = {name: Pointer(types[v]) if isinstance(v, str) else v for name, v in launch.arguments.items()}
    return given | launch.constexprs

"""Makes the plan of a call for the backend `triton`: by the kernels' table, by autotuning, or as it was tuned."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tuned
from .problem import Problem

if TYPE_CHECKING:
    from ..kernels.launch_table import LevelConfig
    from ..kernels.plan import Case, Plan

logger = logging.getLogger(__name__)

MAX_LEVELS = 4
FOCAL_WEIGHTS = tuple(f"w{level}" for level in range(MAX_LEVELS))


def make(operator: str, tensors: dict[str, Tensor], normalize: bool, mask: tuple[bool, ...], precise: bool) -> Plan:
    """The plan of a call on ``tensors``, which are in the layout of the kernels, by name."""
    from ..kernels import autotune

    device = tensors["ctx"].device
    case = _case(tensors, normalize, mask)
    config = None
    if device.type == "cuda":
        config = _tuned(operator, tensors, case)
        if config is None and autotune.enabled() and not torch.cuda.is_current_stream_capturing():

            def seconds(candidate: LevelConfig) -> float:
                return _seconds(_with(candidate, operator, tensors, case, precise), tensors, device)

            config = autotune.choose(operator, case, torch.cuda.get_device_name(device), seconds)
    return _with(config, operator, tensors, case, precise)


def candidates(
    operator: str, operands: dict[str, Tensor], mask: tuple[bool, ...] = (), precise: bool = True
) -> Iterator[tuple[LevelConfig, Callable[[], object]]]:
    """The plans that may be the fastest for a call, the table's first: configuration, and a function that runs it."""
    from ..kernels.launch_table import level_candidates
    from .triton import as_the_kernels_take_them

    tensors = as_the_kernels_take_them(operands)
    case, device = _case(tensors, False, mask), tensors["ctx"].device
    for config in level_candidates(case.height, case.width, case.channels, case.kernel_heights, case.dtype):
        plan = _with(config, operator, tensors, case, precise)
        yield config, functools.partial(plan.run, tensors, device)


def _case(tensors: dict[str, Tensor], normalize: bool, mask: tuple[bool, ...]) -> Case:
    from ..kernels.plan import Case
    from .triton import pitch

    ctx = tensors["ctx"]
    return Case(
        *ctx.shape,
        tuple(tuple(tensors[name].shape[2:]) for name in FOCAL_WEIGHTS if name in tensors),
        ctx.dtype,
        normalize,
        pitch(ctx),
        pitch(tensors["gates"]),
        pitch(tensors["q"]) if "q" in tensors else 0,
        "bias" in tensors,
        mask,
        pitch(tensors["dctx"]) if "dctx" in tensors else 0,
    )


def _with(config: LevelConfig | None, operator: str, tensors: dict[str, Tensor], case: Case, precise: bool) -> Plan:
    """The plan with a configuration; None: that of the table."""
    from ..kernels.operators import PLANS
    from ..kernels.plan import Device

    precision = {"precision": "ieee" if precise else "tf32"} if "q" in tensors else {}
    return PLANS[operator](case, Device.of(tensors["ctx"].device), config, **precision)


def _tuned(operator: str, tensors: dict[str, Tensor], case: Case) -> LevelConfig | None:
    """The configuration that `focalnet tune` found for such calls, if it was asked for."""
    from ..kernels.launch_table import LevelConfig

    shape = (case.batch, case.height, case.width, case.channels)
    found = tuned.choice(Problem(operator, tensors["ctx"].device, case.dtype, *shape, case.kernel_sizes))
    if found is None or found.plan is None:
        return None
    try:
        return LevelConfig(**found.plan)
    except TypeError as error:
        logger.debug("%s: the tuned plan is not used: %s", operator, error)
        return None


def _seconds(plan: Plan, tensors: dict[str, Tensor], device: torch.device, repeats: int = 10) -> float:
    """Time of one run on the device, without compilation."""
    plan.run(tensors, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        plan.run(tensors, device)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats

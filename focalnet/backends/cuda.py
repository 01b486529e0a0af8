"""The backend `cuda`: aggregation by the CUDA C++ kernels of csrc/cuda, the modulator's matrix product by PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import composed, extension
from .problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
# As in csrc/cuda/gated_aggregation.h.
MAX_LEVELS = 8
MAX_KERNEL = 31


@functools.cache
def missing() -> str | None:
    """Why this machine cannot run the backend, or None."""
    if (reason := extension.cuda_missing()) is not None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch, built for CUDA {torch.version.cuda}, finds no device"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not take this call, or None."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device}, not on a CUDA device"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if len(problem.kernel_sizes) > MAX_LEVELS:
        return f"{len(problem.kernel_sizes)} focal levels are more than {MAX_LEVELS}"
    largest = max((max(sizes) for sizes in problem.kernel_sizes), default=0)
    if largest > MAX_KERNEL:
        return f"a focal kernel is {largest} wide, more than {MAX_KERNEL}"
    if problem.height * problem.width >= 2**31:
        return f"a map of {problem.height} x {problem.width} has 2^31 positions or more"
    if (capability := _capability(problem.device)) < MIN_CAPABILITY:
        return f"{problem.device} has compute capability {capability[0]}.{capability[1]}, less than 8.0"
    return None


def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], normalize_modulator: bool
) -> Tensor:
    return torch.ops.focalnet.cuda_gated_aggregation(ctx, gates, focal_weights, normalize_modulator)


def gated_aggregation_bwd(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_ctx, need_gates, need_focal = output_mask
    mask = [need_ctx, need_gates, False, need_focal]
    dctx, dgates, _, *dfocal_weights = _bwd_with_agg(dagg, ctx, gates, focal_weights, normalize_modulator, mask)
    return [dctx, dgates, *dfocal_weights]


def _bwd_with_agg(*arguments: object) -> list[Tensor | None]:
    return torch.ops.focalnet.cuda_gated_aggregation_bwd(*arguments)


focal_modulation = functools.partial(composed.focal_modulation, gated_aggregation)
focal_modulation_bwd = functools.partial(composed.focal_modulation_bwd, gated_aggregation, _bwd_with_agg)

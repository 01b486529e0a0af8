"""The backend `cuda`: aggregation by the CUDA C++ kernels of csrc/cuda, the modulator's matrix product by PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension
from .problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
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


def refuses(problem: Problem) -> str | None:
    """Why the backend does not take this call, or None."""
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
    if (capability := _capability(problem.device)) < OLDEST_CAPABILITY:
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
) -> list[Tensor]:
    need_ctx, need_gates, need_focal = output_mask
    dctx, dgates, _, *dfocal_weights = torch.ops.focalnet.cuda_gated_aggregation_bwd(
        dagg, ctx, gates, focal_weights, normalize_modulator, [need_ctx, need_gates, False, need_focal]
    )
    return [dctx, dgates, *dfocal_weights]


def focal_modulation(
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
) -> Tensor:
    agg = gated_aggregation(ctx, gates, focal_weights, normalize_modulator)
    return F.linear(agg, weight, bias).mul_(q)


def focal_modulation_bwd(
    dout: Tensor,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = output_mask
    need_agg = need_q or need_weight
    dq = dweight = dctx = dgates = agg = None
    dfocal_weights: Sequence[Tensor | None] = [None] * len(focal_weights)
    dmodulator = dout * q
    dbias = dmodulator.sum((0, 1, 2)) if need_bias else None
    if need_ctx or need_gates or need_focal:
        # It runs the levels again: agg, which dq and dweight want, comes of the same run.
        mask = [need_ctx, need_gates, need_agg, need_focal]
        dctx, dgates, agg, *dfocal_weights = torch.ops.focalnet.cuda_gated_aggregation_bwd(
            dmodulator @ weight, ctx, gates, focal_weights, normalize_modulator, mask
        )
    elif need_agg:
        agg = gated_aggregation(ctx, gates, focal_weights, normalize_modulator)
    if need_q:
        dq = F.linear(agg, weight, bias).mul_(dout)
    if need_weight:
        dweight = dmodulator.flatten(0, 2).T @ agg.flatten(0, 2)
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]

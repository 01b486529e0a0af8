"""The backend `cuda`: CUDA C++ kernels (csrc/cuda) for the aggregation and for products with the modulator.

PyTorch computes the modulator and the other matrix products.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import composed, extension
from .problem import Problem

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAKES_OUT = True
MIN_CAPABILITY = (8, 0)
# As in csrc/cuda/gated_aggregation.h.
MAX_LEVELS = 8
MAX_KERNEL = 31
# As in csrc/cuda/toeplitz.h.
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)
MAX_TOEPLITZ_KERNEL = 15
MAX_TOEPLITZ_REACH = 24


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


def why_not_tensor_cores(problem: Problem) -> str | None:
    """Why a call that this backend takes runs on multiply-adds instead of tensor cores, or None if it does not."""
    if problem.dtype not in TENSOR_CORE_DTYPES:
        return f"{problem.dtype} has no exact products on tensor cores; bfloat16 and float16 have"
    if (capability := _capability(problem.device)) < MIN_CAPABILITY:
        return f"{problem.device} has compute capability {capability[0]}.{capability[1]}, less than 8.0"
    largest = max((max(sizes) for sizes in problem.kernel_sizes), default=0)
    if largest > MAX_TOEPLITZ_KERNEL:
        return f"a focal kernel is {largest} wide, more than {MAX_TOEPLITZ_KERNEL}"
    reach = max((sum(size // 2 for size in sizes) for sizes in zip(*problem.kernel_sizes, strict=True)), default=0)
    if reach > MAX_TOEPLITZ_REACH:
        return f"the focal levels reach {reach} positions in all, more than {MAX_TOEPLITZ_REACH}"
    return None


def _uses_tensor_cores(operator: str, ctx: Tensor, focal_weights: Sequence[Tensor]) -> bool:
    kernel_sizes = tuple([weight.shape[-2:] for weight in focal_weights])
    batch, height, width, channels = ctx.shape
    problem = Problem(operator, ctx.device, ctx.dtype, batch, height, width, channels, kernel_sizes)
    reason = why_not_tensor_cores(problem)
    if reason is not None:
        logger.debug("%s: not on tensor cores: %s", operator, reason)
    return reason is None


def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], normalize_modulator: bool
) -> Tensor:
    tensor_cores = _uses_tensor_cores("gated_aggregation", ctx, focal_weights)
    return torch.ops.focalnet.cuda_gated_aggregation(ctx, gates, focal_weights, normalize_modulator, tensor_cores)


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


def _bwd_with_agg(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    out: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """[dctx, dgates, agg, *dfocal_weights]; ``out``: where dctx and dgates go, or nothing. agg lies as dagg does."""
    tensor_cores = _uses_tensor_cores("gated_aggregation_bwd", ctx, focal_weights)
    made = torch.ops.focalnet.cuda_gated_aggregation_bwd(
        dagg, ctx, gates, focal_weights, normalize_modulator, tensor_cores, output_mask, *out
    )
    return [*out, *made[len(out) :]]


def _takes_planar_maps(ctx: Tensor, focal_weights: Sequence[Tensor]) -> bool:
    tensor_cores = _uses_tensor_cores("gated_aggregation_bwd", ctx, focal_weights)
    return torch.ops.focalnet.cuda_takes_planar_maps(ctx, focal_weights, tensor_cores)


def _times_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, out: Tensor | None = None
) -> Tensor:
    # A matrix: of four dimensions that are planar, F.linear would make many small products.
    modulator = F.linear(rows.flatten(0, -2), weight, bias).view(factor.shape)
    out = modulator if out is None else out
    torch.ops.focalnet.cuda_modulate(modulator, factor, out)
    return out


def _times_and_sum(dout: Tensor, q: Tensor, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    dmodulator, total = torch.ops.focalnet.cuda_modulate_bwd(dout, q, need_sum)
    return dmodulator, total if need_sum else None


OPTIONAL = {"padded_linear": F.linear}
_STEPS = composed.Steps(
    gated_aggregation, _bwd_with_agg, _times_linear, _times_and_sum, takes_planar_maps=_takes_planar_maps
)
focal_modulation = functools.partial(composed.focal_modulation, _STEPS)
focal_modulation_bwd = functools.partial(composed.focal_modulation_bwd, _STEPS)

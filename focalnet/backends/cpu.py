"""The backend `cpu`: aggregation by the C++ kernels of csrc/cpu, the modulator's matrix product by PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import composed, extension, quota
from .problem import Problem

DTYPES = (torch.float32, torch.bfloat16)
IN_FLOAT32 = ("bias_gelu", "gelu_bwd")


def missing() -> str | None:
    """Why this machine cannot run the backend, or None."""
    return extension.missing()


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not take this call, or None."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    dtypes = (torch.float32,) if problem.operator in IN_FLOAT32 else DTYPES
    if problem.dtype not in dtypes:
        return f"{problem.dtype} is not one of {', '.join(map(str, dtypes))}"
    return None


def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], normalize_modulator: bool
) -> Tensor:
    return torch.ops.focalnet.cpu_gated_aggregation(ctx, gates, focal_weights, normalize_modulator)


def gated_aggregation_bwd(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    sums: Tensor | None = None,
) -> list[Tensor]:
    """``sums`` (B, C), float32, are the sums of the last level over H and W, if a forward has computed them."""
    return torch.ops.focalnet.cpu_gated_aggregation_bwd(
        dagg, ctx, gates, focal_weights, normalize_modulator, output_mask, sums
    )


def _bwd_with_agg(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_ctx, need_gates, need_agg, need_focal = output_mask
    mask = (need_ctx, need_gates, need_focal)
    agg = sums = None
    if need_agg:
        agg, sums = torch.ops.focalnet.cpu_gated_aggregation_and_sums(ctx, gates, focal_weights, normalize_modulator)
    dctx, dgates, *dfocal = gated_aggregation_bwd(dagg, ctx, gates, focal_weights, normalize_modulator, mask, sums)
    return [dctx, dgates, agg, *dfocal]


focal_modulation = functools.partial(composed.focal_modulation, gated_aggregation)
focal_modulation_bwd = functools.partial(composed.focal_modulation_bwd, gated_aggregation, _bwd_with_agg)

# Operators of the extension that only this backend has. They are None if the extension is missing, but then `missing`
# rejects the backend first.
_COMPILED = {
    "block": "cpu_block",
    "patch_embed": "cpu_patch_embed",
    "norm_mean": "cpu_norm_mean",
    "linear": "cpu_linear",
    "bias_gelu": "cpu_bias_gelu_",
    "gelu_bwd": "cpu_gelu_backward_",
}
OPTIONAL = {operator: getattr(torch.ops.focalnet, name, None) for operator, name in _COMPILED.items()}

if extension.missing() is None:
    torch.ops.focalnet.cpu_limit_threads(quota.most_threads(quota.processors()) or 0)

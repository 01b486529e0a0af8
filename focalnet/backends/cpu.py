"""The backend `cpu`: the C++ kernels of csrc/cpu. PyTorch computes the modulator's product where these have none."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import composed, extension, quota
from .problem import Problem

DTYPES = (torch.float32, torch.bfloat16)
TRAINED = ("mlp_fwd", "mlp_bwd", "linear_fwd", "linear_bwd")
# Below this, packing the weights costs more than faster products save.
MIN_ROWS = 64
# The MLP reads and writes rows of whole panels of this many channels (csrc/cpu/block.h: kPanel).
PANEL = 16


def missing() -> str | None:
    """Why this machine cannot run the backend, or None."""
    return extension.missing()


def has_dot_products() -> bool:
    """Whether products of bfloat16 run on instructions of the processor for them, or on their emulation."""
    return torch.ops.focalnet.cpu_isa() in ("avx512_bf16", "emulated", "amx", "amx_emulated")


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not take this call, or None."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if problem.operator in TRAINED and problem.dtype == torch.bfloat16 and not has_dot_products():
        return "the processor has no dot products of bfloat16 (AVX512_BF16 or AMX)"
    if problem.operator in TRAINED and problem.height < MIN_ROWS:
        return f"{problem.height} rows are fewer than {MIN_ROWS}"
    widths = (problem.channels, *problem.widths)
    if problem.operator in ("mlp_fwd", "mlp_bwd") and any(width % PANEL for width in widths):
        return f"the layers are {' x '.join(map(str, widths))} wide, not all multiples of {PANEL}"
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


def linear_bwd(
    dout: Tensor, rows: Tensor, weight: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """[drows, dweight, dbias] of a linear layer; ``mask`` selects among them."""
    need_rows, need_weight, need_bias = mask
    drows, dweight, dbias = torch.ops.focalnet.cpu_linear_bwd(dout, rows, weight, need_rows, need_weight or need_bias)
    return drows if need_rows else None, dweight if need_weight else None, dbias if need_bias else None


def mlp_bwd(
    dout: Tensor, rows: Tensor, fc1: Tensor, weight1: Tensor, weight2: Tensor, mask: Sequence[bool]
) -> list[Tensor | None]:
    """[drows, dweight1, dbias1, dweight2, dbias2]; ``mask`` selects among them."""
    need_rows, need_first, need_second = mask[0], mask[1] or mask[2], mask[3] or mask[4]
    made = torch.ops.focalnet.cpu_mlp_bwd(dout, rows, fc1, weight1, weight2, need_rows, need_first, need_second)
    return [gradient if need else None for gradient, need in zip(made, mask, strict=True)]


def _has_product(rows: Tensor) -> bool:
    positions, channels = rows.numel() // rows.shape[-1], rows.shape[-1]
    return why_not(Problem("linear_fwd", rows.device, rows.dtype, 1, positions, 1, channels)) is None


def _times_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    strides = factor.stride()
    is_matrix = strides[0] == strides[1] * factor.shape[1] and strides[1] == strides[2] * factor.shape[2]
    if not (_has_product(rows) and is_matrix and strides[3] == 1 and weight.shape[0] % PANEL == 0):
        return composed.times_linear(rows, weight, bias, factor)
    factor = factor.flatten(0, 2)
    return torch.ops.focalnet.cpu_linear_fwd(rows.flatten(0, 2), weight, bias, factor).view(rows.shape)


def _linear_bwd(dout: Tensor, rows: Tensor, weight: Tensor, mask: Sequence[bool]) -> Sequence[Tensor | None]:
    run = linear_bwd if _has_product(rows) else composed.linear_bwd
    return run(dout, rows, weight, mask)


_STEPS = composed.Steps(gated_aggregation, _bwd_with_agg, times_linear=_times_linear, linear_bwd=_linear_bwd)
focal_modulation = functools.partial(composed.focal_modulation, _STEPS)
focal_modulation_bwd = functools.partial(composed.focal_modulation_bwd, _STEPS)

# Operators of the extension that only this backend has. They are None if the extension is missing, but then `missing`
# rejects the backend first.
_COMPILED = {
    "block": "cpu_block",
    "patch_embed": "cpu_patch_embed",
    "norm_mean": "cpu_norm_mean",
    "linear": "cpu_linear",
    "linear_fwd": "cpu_linear_fwd",
    "mlp_fwd": "cpu_mlp_fwd",
}
OPTIONAL = {operator: getattr(torch.ops.focalnet, name, None) for operator, name in _COMPILED.items()} | {
    "linear_bwd": linear_bwd,
    "mlp_bwd": mlp_bwd,
}

if extension.missing() is None:
    torch.ops.focalnet.cpu_limit_threads(quota.most_threads(quota.processors()) or 0)

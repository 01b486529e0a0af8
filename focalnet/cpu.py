"""The backend `cpu`: aggregation by the C++ kernels of csrc/cpu, the modulator's matrix product by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension
from .problem import Problem

DTYPES = (torch.float32, torch.bfloat16)


def missing() -> str | None:
    """Why this machine cannot run the backend, or None."""
    return extension.missing()


def refuses(problem: Problem) -> str | None:
    """Why the backend does not take this call, or None."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, DTYPES))}"
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
) -> list[Tensor]:
    return torch.ops.focalnet.cpu_gated_aggregation_bwd(
        dagg, ctx, gates, focal_weights, normalize_modulator, output_mask
    )


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
    dq = dweight = dbias = None
    aggregation_gradients: list[Tensor | None] = [None] * (2 + len(focal_weights))
    dmodulator = dout * q
    if need_q or need_weight:
        agg = gated_aggregation(ctx, gates, focal_weights, normalize_modulator)
    if need_q:
        dq = F.linear(agg, weight, bias).mul_(dout)
    if need_weight:
        dweight = dmodulator.flatten(0, 2).T @ agg.flatten(0, 2)
    if need_bias:
        dbias = dmodulator.sum((0, 1, 2))
    if need_ctx or need_gates or need_focal:
        aggregation_gradients = gated_aggregation_bwd(
            dmodulator @ weight, ctx, gates, focal_weights, normalize_modulator, (need_ctx, need_gates, need_focal)
        )
    dctx, dgates, *dfocal_weights = aggregation_gradients
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]

"""Focal modulation for backends that have kernels for the aggregation only. PyTorch computes the matrix products.

``aggregate(ctx, gates, focal_weights, normalize_modulator)`` returns agg. ``aggregate_bwd(dagg, ctx, gates,
focal_weights, normalize_modulator, mask)`` returns [dctx, dgates, agg, *dfocal_weights]. ``mask`` selects among ctx,
gates, agg and the focal weights; the others are None. Backward returns agg too, because it recomputes the levels and
gets agg at little extra cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def focal_modulation(
    aggregate: Callable[..., Tensor],
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
) -> Tensor:
    agg = aggregate(ctx, gates, focal_weights, normalize_modulator)
    return F.linear(agg, weight, bias).mul_(q)


def focal_modulation_bwd(
    aggregate: Callable[..., Tensor],
    aggregate_bwd: Callable[..., list[Tensor | None]],
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
    dq = dweight = dctx = dgates = None
    agg: Any = None  # a tensor wherever it is needed
    dfocal_weights: Sequence[Tensor | None] = [None] * len(focal_weights)
    dmodulator = dout * q
    dbias = dmodulator.sum((0, 1, 2)) if need_bias else None
    if need_ctx or need_gates or need_focal:
        mask = [need_ctx, need_gates, need_agg, need_focal]
        dctx, dgates, agg, *dfocal_weights = aggregate_bwd(
            dmodulator @ weight, ctx, gates, focal_weights, normalize_modulator, mask
        )
    elif need_agg:
        agg = aggregate(ctx, gates, focal_weights, normalize_modulator)
    if need_q:
        dq = F.linear(agg, weight, bias).mul_(dout)
    if need_weight:
        dweight = dmodulator.flatten(0, 2).T @ agg.flatten(0, 2)
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]

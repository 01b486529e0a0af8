"""Focal modulation for backends that have kernels for the aggregation only. PyTorch computes the matrix products.

``aggregate(ctx, gates, focal_weights, normalize_modulator)`` returns agg. ``aggregate_bwd(dagg, ctx, gates,
focal_weights, normalize_modulator, mask)`` returns [dctx, dgates, agg, *dfocal_weights]. ``mask`` selects among ctx,
gates, agg and the focal weights; the others are None. Backward returns agg too, because it recomputes the levels and
gets agg at little extra cost. ``product`` and ``linear_bwd`` are `times_linear` and `linear_bwd`, or faster versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def times_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, out: Tensor | None = None
) -> Tensor:
    """``(rows @ weight.T + bias) * factor``, (..., K) -> (..., N), in ``out`` if given."""
    made = F.linear(rows, weight, bias)
    return torch.mul(made, factor, out=made if out is None else out)


def linear_bwd(dout: Tensor, rows: Tensor, weight: Tensor, mask: Sequence[bool]) -> list[Tensor | None]:
    """[drows, dweight, dbias] of a linear layer for rows (n, K); ``mask`` selects among them."""
    need_rows, need_weight, need_bias = mask
    return [
        dout @ weight if need_rows else None,
        dout.T @ rows if need_weight else None,
        dout.sum(0) if need_bias else None,
    ]


def focal_modulation(
    aggregate: Callable[..., Tensor],
    product: Callable[..., Tensor],
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
) -> Tensor:
    agg = aggregate(ctx, gates, focal_weights, normalize_modulator)
    return product(agg, weight, bias, q)


def focal_modulation_bwd(
    aggregate: Callable[..., Tensor],
    aggregate_bwd: Callable[..., list[Tensor | None]],
    product: Callable[..., Tensor],
    linear_bwd: Callable[..., Sequence[Tensor | None]],
    dout: Tensor,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """``out``: see `registry.Backend`. Only dq is written there, for which ``product`` must take ``out``."""
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = output_mask
    need_agg = need_q or need_weight
    dq = dctx = dgates = None
    agg: Any = None  # a tensor wherever it is needed
    dfocal_weights: Sequence[Tensor | None] = [None] * len(focal_weights)
    dmodulator = (dout * q).flatten(0, 2)
    if need_ctx or need_gates or need_focal:
        mask = [need_ctx, need_gates, need_agg, need_focal]
        dagg: Any = linear_bwd(dmodulator, dmodulator, weight, (True, False, False))[0]  # a tensor: it is asked for
        dagg = dagg.view(ctx.shape)
        dctx, dgates, agg, *dfocal_weights = aggregate_bwd(dagg, ctx, gates, focal_weights, normalize_modulator, mask)
    elif need_agg:
        agg = aggregate(ctx, gates, focal_weights, normalize_modulator)
    if need_q:
        dq = product(agg, weight, bias, dout) if out is None else product(agg, weight, bias, dout, out=out[0])
    rows = dmodulator if agg is None else agg.flatten(0, 2)
    _, dweight, dbias = linear_bwd(dmodulator, rows, weight, (False, need_weight, need_bias))
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]

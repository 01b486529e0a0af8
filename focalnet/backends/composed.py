"""Focal modulation for backends that have kernels for the aggregation and for steps around the modulator's product.

A backend gives its kernels as `Steps`; PyTorch computes the rest. Backward recomputes the modulator. It asks the
aggregation's backward for agg too, which recomputes the levels and gets agg at little extra cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def times_and_sum(dout: Tensor, q: Tensor, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    """``dout * q`` (B, H, W, C), and None: `linear_bwd` computes the sum."""
    return dout * q, None


def linear_bwd(dout: Tensor, rows: Tensor, weight: Tensor, mask: Sequence[bool]) -> list[Tensor | None]:
    """[drows, dweight, dbias] of a linear layer for rows (n, K); ``mask`` selects among them."""
    need_rows, need_weight, need_bias = mask
    return [
        dout @ weight if need_rows else None,
        dout.T @ rows if need_weight else None,
        dout.sum(0) if need_bias else None,
    ]


def never(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class Steps:
    """What a backend does of focal modulation. All but the first two are those of this file, or faster ones.

    ``aggregate(ctx, gates, focal_weights, normalize_modulator)`` returns agg. ``aggregate_bwd(dagg, ctx, gates,
    focal_weights, normalize_modulator, mask)`` returns [dctx, dgates, agg, *dfocal_weights]; ``mask`` selects among
    ctx, gates, agg and the focal weights, and the others are None. ``times_and_sum(dout, q, need_sum)`` returns their
    product and, if it is wanted, the sum of that over all positions (C,), or None if `linear_bwd` is to compute it.
    ``takes_planar_maps(ctx, focal_weights)``: whether ``aggregate_bwd`` wants dagg as a view of a matrix
    (C, B * H * W), and returns agg as one. Products read and write either at the same cost.

    If the backend takes ``out`` (see `registry.Backend`), so must ``times_linear``, for dq, and ``aggregate_bwd``, for
    dctx and dgates; they return it.
    """

    aggregate: Callable[..., Tensor]
    aggregate_bwd: Callable[..., Sequence[Tensor | None]]
    times_linear: Callable[..., Tensor] = times_linear
    times_and_sum: Callable[..., tuple[Tensor, Tensor | None]] = times_and_sum
    linear_bwd: Callable[..., Sequence[Tensor | None]] = linear_bwd
    takes_planar_maps: Callable[..., bool] = never


def focal_modulation(
    steps: Steps,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
) -> Tensor:
    agg = steps.aggregate(ctx, gates, focal_weights, normalize_modulator)
    return steps.times_linear(agg, weight, bias, q)


def focal_modulation_bwd(
    steps: Steps,
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
    """``out``: see `registry.Backend`."""
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = output_mask
    need_dagg, need_agg = need_ctx or need_gates or need_focal, need_q or need_weight
    to_dq, to_dctx = ({}, {}) if out is None else ({"out": out[0]}, {"out": out[1:]})
    inputs = ctx, gates, focal_weights, normalize_modulator
    dq = dctx = dgates = dweight = dbias = None
    agg: Any = None  # tensors wherever they are needed
    dmodulator: Any = None
    dfocal_weights: Sequence[Tensor | None] = [None] * len(focal_weights)
    if need_dagg or need_weight or need_bias:
        dmodulator, dbias = steps.times_and_sum(dout, q, need_bias)
        dmodulator = dmodulator.flatten(0, 2)
    if need_dagg:
        if steps.takes_planar_maps(ctx, focal_weights):
            dagg: Any = (weight.T @ dmodulator.T).T
        else:
            dagg = steps.linear_bwd(dmodulator, dmodulator, weight, (True, False, False))[0]
        mask = [need_ctx, need_gates, need_agg, need_focal]
        dctx, dgates, agg, *dfocal_weights = steps.aggregate_bwd(dagg.view(ctx.shape), *inputs, mask, **to_dctx)
    elif need_agg:
        agg = steps.aggregate(*inputs)
    if need_q:
        dq = steps.times_linear(agg, weight, bias, dout, **to_dq)
    need_sum = need_bias and dbias is None
    if need_weight or need_sum:
        rows = dmodulator if agg is None else agg.flatten(0, 2)
        _, dweight, summed = steps.linear_bwd(dmodulator, rows, weight, (False, need_weight, need_sum))
        dbias = summed if need_sum else dbias
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]

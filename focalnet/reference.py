"""The specification: focal modulation and its gradients in plain PyTorch.

Focal modulation (Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926, section 3.2, equations 4-6)
gathers context level by level and multiplies every query by it. All other backends are tested against this file. It is
short, uses no in-place operation, and works in every floating-point dtype from bfloat16 to float64.

All functions take and return channels-last tensors, ``(B, H, W, C)``; ``focal_weights`` are L depthwise kernels of
shape ``(C, 1, kh, kw)`` with odd ``kh`` and ``kw``; ``weight`` is ``(C, C)``. Arguments are not checked here; see
`functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .onednn import conv2d

Levels = list[Tensor]


def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], normalize_modulator: bool = False
) -> Tensor:
    """Context of growing range, summed under one gate per position and level.

    ``ctx`` (B, H, W, C), ``gates`` (B, H, W, L + 1) -> (B, H, W, C).
    """
    contexts = _gelu_each(_focal_levels(ctx, focal_weights))
    return _aggregate(contexts, gates, normalize_modulator).contiguous()


def focal_modulation(
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    normalize_modulator: bool = False,
) -> Tensor:
    """``q * (gated_aggregation(ctx, gates, focal_weights) @ weight.T + bias)``; q (B, H, W, C) -> (B, H, W, C)."""
    agg = gated_aggregation(ctx, gates, focal_weights, normalize_modulator)
    return q * F.linear(agg, weight, bias)


def gated_aggregation_bwd(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients ``[dctx, dgates, *dfocal_weights]``, each shaped like its input; ``dagg`` is (B, H, W, C).

    ``output_mask`` selects among (ctx, gates, focal_weights); the other gradients are None.
    """
    levels = _focal_levels(ctx, focal_weights)
    return _aggregation_gradients(dagg, ctx, levels, gates, focal_weights, normalize_modulator, output_mask)


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
    """Gradients ``[dq, dctx, dgates, dweight, dbias, *dfocal_weights]``; ``dout`` is (B, H, W, C).

    Everything is recomputed from the inputs; forward saves nothing else. ``output_mask`` selects among (q, ctx, gates,
    weight, bias, focal_weights); the other gradients are None.
    """
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = output_mask
    dq = dweight = dbias = None
    aggregation_gradients: list[Tensor | None] = [None] * (2 + len(focal_weights))
    levels = _focal_levels(ctx, focal_weights)
    dmodulator = dout * q
    if need_q or need_weight:
        agg = _aggregate(_gelu_each(levels), gates, normalize_modulator).contiguous()
    if need_q:
        dq = dout * F.linear(agg, weight, bias)
    if need_weight:
        dweight = dmodulator.flatten(0, 2).T @ agg.flatten(0, 2)
    if need_bias:
        dbias = dmodulator.sum((0, 1, 2))
    if need_ctx or need_gates or need_focal:
        aggregation_gradients = _aggregation_gradients(
            dmodulator @ weight,
            ctx,
            levels,
            gates,
            focal_weights,
            normalize_modulator,
            (need_ctx, need_gates, need_focal),
        )
    dctx, dgates, *dfocal_weights = aggregation_gradients
    return [dq, dctx, dgates, dweight, dbias, *dfocal_weights]


def _focal_levels(ctx: Tensor, focal_weights: Sequence[Tensor]) -> Levels:
    """z_l = depthwise_conv(ctx_l, k_l) with ctx_0 = ctx and ctx_{l+1} = GELU(z_l), each (B, H, W, C)."""
    levels = []
    for focal_weight in focal_weights:
        levels.append(_depthwise_conv(ctx, focal_weight))
        ctx = F.gelu(levels[-1])
    return levels


def _gelu_each(levels: Levels) -> Levels:
    return [F.gelu(level) for level in levels]


def _aggregate(contexts: Levels, gates: Tensor, normalize_modulator: bool) -> Tensor:
    agg = gates[..., :1] * contexts[0]
    for level, context in enumerate(contexts[1:], start=1):
        agg = agg + gates[..., level : level + 1] * context
    agg = agg + gates[..., -1:] * F.gelu(contexts[-1].mean((1, 2), keepdim=True))
    return agg / (len(contexts) + 1) if normalize_modulator else agg


def _depthwise_conv(x: Tensor, focal_weight: Tensor) -> Tensor:
    """NHWC in and out. The permuted views are channels-last NCHW tensors to cuDNN and oneDNN."""
    padding = [size // 2 for size in focal_weight.shape[-2:]]
    out = conv2d(x.permute(0, 3, 1, 2), focal_weight, padding=padding, groups=focal_weight.shape[0])
    return out.permute(0, 2, 3, 1)


def _depthwise_conv_bwd(dz: Tensor, x: Tensor, focal_weight: Tensor, mask: list[bool]) -> tuple[Any, Any]:
    """The gradients of x and the weight, None where ``mask`` does not ask for it."""
    padding = [size // 2 for size in focal_weight.shape[-2:]]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        focal_weight,
        None,
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        focal_weight.shape[0],
        [*mask, False],
    )
    return dx.permute(0, 2, 3, 1) if mask[0] else None, dweight


def _aggregation_gradients(
    dagg: Tensor,
    ctx: Tensor,
    levels: Levels,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_ctx, need_gates, need_focal = output_mask
    contexts = _gelu_each(levels)
    mean = contexts[-1].mean((1, 2), keepdim=True)
    if normalize_modulator:
        dagg = dagg / (len(levels) + 1)

    dgates = None
    if need_gates:
        dgates = torch.stack([(dagg * context).sum(-1) for context in [*contexts, F.gelu(mean)]], -1)
    dfocal_weights: list[Tensor | None] = [None] * len(levels)
    if not (need_ctx or need_focal):
        return [None, dgates, *dfocal_weights]

    dglobal = (dagg * gates[..., -1:]).sum((1, 2), keepdim=True)
    dcontext = torch.ops.aten.gelu_backward(dglobal, mean) / (ctx.shape[1] * ctx.shape[2])
    for level in reversed(range(len(levels))):
        dcontext = dcontext + dagg * gates[..., level : level + 1]
        dlevel = torch.ops.aten.gelu_backward(dcontext, levels[level])
        below = contexts[level - 1] if level > 0 else ctx
        mask = [need_ctx or level > 0, need_focal]
        dcontext, dfocal_weights[level] = _depthwise_conv_bwd(dlevel, below, focal_weights[level], mask)
    return [dcontext, dgates, *dfocal_weights]

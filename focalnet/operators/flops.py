"""FLOP formulas of the operators for torch.utils.flop_counter.

Forward and backward count the same as PyTorch's formulas for the equivalent modules, so that a model's total is the
same with and without these operators. Recomputation in backward is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

# These imports register the operators.
from ..backends import extension as _operators_0  # noqa: F401
from . import focal_modulation as _operators_3  # noqa: F401
from . import norm_linear as _operators_1  # noqa: F401
from . import norm_mlp as _operators_2  # noqa: F401

Shape = Sequence[int]


def _formula_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        operator = getattr(torch.ops.focalnet, name, None)  # operators of the extension may be missing
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)
        return formula

    return register


def _product(rows: Shape, matrix: Shape) -> int:
    """FLOPs of the product of (..., K) with a matrix (N, K). The gradient of either operand counts the same."""
    return 2 * prod(rows[:-1]) * prod(matrix)


def _convolutions(ctx: Shape, focal_weights: Sequence[Shape]) -> int:
    return sum(_product(ctx, weight) for weight in focal_weights)


def _convolutions_bwd(ctx: Shape, focal_weights: Sequence[Shape], need_ctx: bool, need_focal: bool) -> int:
    """FLOPs by PyTorch's own formula, which counts the gradient of a depthwise weight like that of a dense weight."""
    batch, height, width, channels = ctx
    nchw = [batch, channels, height, width]
    count = 0
    for level, weight in enumerate(focal_weights):
        mask = [need_ctx or level > 0, need_focal, False]
        settings = ([1, 1], [size // 2 for size in weight[2:]], [1, 1], False, [0, 0], channels)
        formula = flop_registry[torch.ops.aten.convolution_backward]
        count += formula(nchw, nchw, weight, None, *settings, mask, out_val=[nchw, weight, None])
    return count if need_ctx or need_focal else 0


@_formula_of("gated_aggregation")
def _gated_aggregation(
    ctx: Shape, gates: Shape, focal_weights: Sequence[Shape], *args: object, **kwargs: object
) -> int:
    return _convolutions(ctx, focal_weights)


@_formula_of("gated_aggregation_bwd")
def _gated_aggregation_bwd(
    dagg: Shape,
    ctx: Shape,
    gates: Shape,
    focal_weights: Sequence[Shape],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    *args: object,
    **kwargs: object,
) -> int:
    need_ctx, _, need_focal = output_mask
    return _convolutions_bwd(ctx, focal_weights, need_ctx, need_focal)


@_formula_of("focal_modulation")
def _focal_modulation(
    q: Shape,
    ctx: Shape,
    gates: Shape,
    focal_weights: Sequence[Shape],
    weight: Shape,
    *args: object,
    **kwargs: object,
) -> int:
    return _convolutions(ctx, focal_weights) + _product(ctx, weight)


@_formula_of("focal_modulation_bwd")
def _focal_modulation_bwd(
    dout: Shape,
    q: Shape,
    ctx: Shape,
    gates: Shape,
    focal_weights: Sequence[Shape],
    weight: Shape,
    bias: Shape | None,
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    *args: object,
    **kwargs: object,
) -> int:
    _, need_ctx, need_gates, need_weight, _, need_focal = output_mask
    products = (need_ctx or need_gates or need_focal) + need_weight
    return products * _product(ctx, weight) + _convolutions_bwd(ctx, focal_weights, need_ctx, need_focal)


def _ctx(projected: Shape, weight: Shape) -> Shape:
    return [*projected[:-1], weight[0]]


@_formula_of("packed_focal_modulation")
def _packed_focal_modulation(
    projected: Shape, focal_weights: Sequence[Shape], weight: Shape, *args: object, **kwargs: object
) -> int:
    ctx = _ctx(projected, weight)
    return _convolutions(ctx, focal_weights) + _product(ctx, weight)


@_formula_of("packed_focal_modulation_bwd")
def _packed_focal_modulation_bwd(
    dout: Shape,
    projected: Shape,
    focal_weights: Sequence[Shape],
    weight: Shape,
    bias: Shape | None,
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    *args: object,
    **kwargs: object,
) -> int:
    need_projected, need_weight, _, need_focal = output_mask
    ctx = _ctx(projected, weight)
    products = (need_projected or need_focal) + need_weight
    return products * _product(ctx, weight) + _convolutions_bwd(ctx, focal_weights, need_projected, need_focal)


@_formula_of("norm_linear")
def _norm_linear(
    hidden_state: Shape,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    eps: float,
    weight: Shape,
    *args: object,
    **kwargs: object,
) -> int:
    return _product(hidden_state, weight)


@_formula_of("norm_linear_bwd")
def _norm_linear_bwd(
    dout: Shape,
    hidden_state: Shape,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    eps: float,
    weight: Shape,
    bias: Shape | None,
    output_mask: Sequence[bool],
    *args: object,
    **kwargs: object,
) -> int:
    *need_norm, need_weight, _ = output_mask
    return (any(need_norm) + need_weight) * _product(hidden_state, weight)


@_formula_of("norm_mlp")
def _norm_mlp(
    hidden_state: Shape,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    eps: float | None,
    weight1: Shape,
    bias1: Shape | None,
    weight2: Shape,
    *args: object,
    **kwargs: object,
) -> int:
    return _product(hidden_state, weight1) + _product(hidden_state, weight2)


@_formula_of("norm_mlp_bwd")
def _norm_mlp_bwd(
    dout: Shape,
    fc1: Shape,
    hidden_state: Shape,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    eps: float | None,
    weight1: Shape,
    bias1: Shape | None,
    weight2: Shape,
    bias2: Shape | None,
    output_mask: Sequence[bool],
    *args: object,
    **kwargs: object,
) -> int:
    *need_norm, need_weight1, need_bias1, need_weight2, _ = output_mask
    first = any(need_norm) + need_weight1
    second = any((*need_norm, need_weight1, need_bias1)) + need_weight2
    return first * _product(hidden_state, weight1) + second * _product(hidden_state, weight2)


@_formula_of("cpu_block")
def _cpu_block(
    hidden_state: Shape,
    projection_in: Shape,
    projection_in_bias: Shape | None,
    focal_weights: Sequence[Shape],
    projection_context: Shape,
    projection_context_bias: Shape | None,
    projection_out: Shape,
    projection_out_bias: Shape | None,
    fc1: Shape,
    fc1_bias: Shape | None,
    fc2: Shape,
    *args: object,
    **kwargs: object,
) -> int:
    matrices = (projection_in, projection_context, projection_out, fc1, fc2)
    return _convolutions(hidden_state, focal_weights) + sum(_product(hidden_state, matrix) for matrix in matrices)


@_formula_of("cpu_linear")
def _cpu_linear(input: Shape, weight: Shape, *args: object, **kwargs: object) -> int:
    return _product(input, weight)


@_formula_of("cpu_patch_embed")
def _cpu_patch_embed(input: Shape, weight: Shape, *args: object, out_shape: Shape, **kwargs: object) -> int:
    return _product(out_shape, weight)

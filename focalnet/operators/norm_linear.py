"""A linear layer, with or without the LayerNorm before it, as one operator that saves only its input for backward.

    norm_linear(x) = Linear(LayerNorm(x))          x (..., K) -> (..., N)

With two modules, autograd saves x for the norm and LayerNorm(x) for the gradient of the linear weight. This operator
saves only x and recomputes LayerNorm(x) in backward. That saves K elements per token and costs two passes over K. On a
GPU the kernel of the norm's gradient also writes LayerNorm(x) (kernels/layer_norm.py), in four passes where PyTorch's
operators need seven. On a CPU csrc/cpu/linear_ops.cpp computes the products.

projection_in has 2C + L + 1 output features, so its rows would begin at odd multiples of 2, 4 or 8 bytes. With
``padded`` they begin at multiples of `ROW_ELEMENTS` elements, and kernels on a GPU read 16 bytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.registry import optional, requested
from ..kernels.padding import padded_row
from .define import operator
from .gradients import composed_gradients, pack, unpack


def padded_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor (..., N) whose rows begin at multiples of `ROW_ELEMENTS` elements.

    On a CPU zeros lie between the rows. A product of bfloat16 by oneDNN on AMX reads what lies there as well, and NaN
    left from before would get into its results.
    """
    *leading, features = shape
    new = like.new_empty if like.is_cuda else like.new_zeros
    return new((*leading, padded_row(features)))[..., :features]


def padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)``, (..., K) -> (..., N), whose rows begin at multiples of `ROW_ELEMENTS` elements.

    The product has as many output features as a row has elements, and nobody reads those beyond N. A product that
    writes into a tensor with gaps (``out=``) needs no more weights, but cuBLAS then adds no bias: PyTorch first copies
    the bias to every row, and the product reads all of it back.
    """
    features = weight.shape[0]
    rows = padded_row(features)
    bias = None if bias is None else _with_rows(bias, rows)
    return F.linear(x, _with_rows(weight, rows), bias)[..., :features]


def with_room(parameter: Tensor) -> Tensor:
    """A copy of ``parameter`` (N, ...) in memory for a multiple of `ROW_ELEMENTS` rows; the others are 0.

    `padded_linear` reads those rows where they lie.
    """
    rows, *size = parameter.shape
    return parameter.new_zeros((padded_row(rows), *size))[:rows].copy_(parameter)


def wants_room(parameter: Tensor) -> bool:
    """Whether `padded_linear` would copy ``parameter`` (N, ...) on its device: rows are padded on a GPU alone."""
    return parameter.is_cuda and not _has_room(parameter)


def _has_room(parameter: Tensor) -> bool:
    """Whether the memory of ``parameter`` (N, ...) goes on to a multiple of `ROW_ELEMENTS` rows."""
    rows, *size = parameter.shape
    end = parameter.storage_offset() + padded_row(rows) * math.prod(size)
    return parameter.is_contiguous() and parameter.untyped_storage().nbytes() >= end * parameter.itemsize


def _with_rows(parameter: Tensor, rows: int) -> Tensor:
    """``parameter`` (N, ...) and ``rows`` - N more: what lies behind it, or its last row again where nothing does."""
    if not torch.compiler.is_compiling() and _has_room(parameter):
        return parameter.as_strided((rows, *parameter.shape[1:]), parameter.stride())
    return torch.cat([parameter, parameter[-1:].expand(rows - parameter.shape[0], *parameter.shape[1:])])


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[LayerNorm(x), mean, 1 / standard deviation], or [x, None, None] without norm."""
    return (x, None, None) if eps is None else torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_bwd(
    dnormed: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> Sequence[Tensor | None]:
    dnormed = dnormed.to(x.dtype)
    if statistics[0] is None:
        return dnormed, None, None
    gradients = torch.ops.aten.native_layer_norm_backward(dnormed, x, x.shape[-1:], *statistics, weight, bias, mask)
    return unpack(gradients, mask)


def composed(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The specification. ``eps`` None means no norm. The norm runs in ``hidden_state``'s dtype, the product in
    ``weight``'s.
    """
    return F.linear(norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight.dtype), weight, bias)


@operator
def norm_linear(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
    backend: str | None = None,
    padded: bool = False,
) -> Tensor:
    normed = norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight.dtype)
    if padded:
        return padded_linear(normed, weight, bias)
    run = optional("linear_fwd", normed, backend)
    if isinstance(run, str):
        return F.linear(normed, weight, bias)
    return run(normed.flatten(0, -2), weight, bias).view(*normed.shape[:-1], weight.shape[0])


@operator
def norm_linear_bwd(
    dout: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    *need_norm, need_weight, need_bias = output_mask
    rows, x = dout.flatten(0, -2), hidden_state.flatten(0, -2)
    kernel = optional("layer_norm_bwd", x, backend, norm=(norm_weight, norm_bias, eps))
    if any(need_norm) and not isinstance(kernel, str):
        dtype = weight.dtype if need_weight else None
        normed, *from_norm = kernel(rows @ weight, x, norm_weight, norm_bias, eps, need_norm, dtype)
        dweight = rows.T @ normed if need_weight else None
        dbias = rows.sum(0) if need_bias else None
    else:
        normed, *statistics = norm(x, norm_weight, norm_bias, eps)
        mask = (any(need_norm), need_weight, need_bias)
        dnormed, dweight, dbias = linear_bwd(rows, normed.to(weight.dtype), weight, mask, backend)
        from_norm = [None, None, None]
        if dnormed is not None:
            from_norm = norm_bwd(dnormed, x, statistics, norm_weight, norm_bias, need_norm)
    dx, *dnorm = from_norm
    return pack([None if dx is None else dx.view_as(hidden_state), *dnorm, dweight, dbias], hidden_state)


def linear_bwd(
    dout: Tensor, rows: Tensor, weight: Tensor, mask: Sequence[bool], backend: str | None
) -> Sequence[Tensor | None]:
    """[drows, dweight, dbias] of ``rows`` (n, K) -> (n, N); ``mask`` selects among them."""
    run = optional("linear_bwd", dout, backend)
    if not isinstance(run, str):
        return run(dout.contiguous(), rows, weight, mask)
    need_rows, need_weight, need_bias = mask
    return [
        dout @ weight if need_rows else None,
        dout.T @ rows if need_weight else None,
        dout.sum(0) if need_bias else None,
    ]


@torch.library.register_fake("focalnet::norm_linear")
def _fake(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
    backend: str | None = None,
    padded: bool = False,
) -> Tensor:
    shape = (*hidden_state.shape[:-1], weight.shape[0])
    return padded_empty(weight, shape) if padded else weight.new_empty(shape)


@torch.library.register_fake("focalnet::norm_linear_bwd")
def _bwd_fake(
    dout: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: list[bool],
    *_: object,
) -> list[Tensor]:
    inputs = (hidden_state, norm_weight, norm_bias, weight, bias)
    pairs = zip(inputs, output_mask, strict=True)
    return pack([t.new_empty(t.shape) if want and t is not None else None for t, want in pairs], hidden_state)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_state, norm_weight, norm_bias, ctx.eps, weight, bias, backend, _ = inputs
    ctx.backend = requested(backend)
    ctx.save_for_backward(hidden_state, norm_weight, norm_bias, weight, bias)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    hidden_state, norm_weight, norm_bias, weight, bias = tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = composed_gradients(lambda x, g, s, w, b: composed(x, g, s, ctx.eps, w, b), tensors, dout)
    else:
        need = ctx.needs_input_grad
        mask = [need[0], need[1], need[2], need[4], need[5]]
        gradients = unpack(
            torch.ops.focalnet.norm_linear_bwd(
                dout, hidden_state, norm_weight, norm_bias, ctx.eps, weight, bias, mask, ctx.backend
            ),
            mask,
        )
    return (*gradients[:3], None, *gradients[3:], None, None)


torch.library.register_autograd("focalnet::norm_linear", _autograd, setup_context=_setup)

"""LayerNorm and the following linear layer as one operator that saves only the norm's input for backward.

    norm_linear(x) = Linear(LayerNorm(x))          x (..., K) -> (..., N)

With two modules, autograd saves x for the norm and LayerNorm(x) for the gradient of the linear weight. This operator
saves only x and recomputes LayerNorm(x) in backward. That saves K elements per token and costs two passes over K. On a
GPU the kernel of the norm's gradient also writes LayerNorm(x) (kernels/layer_norm.py), in four passes where PyTorch's
operators need seven.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.registry import optional, requested
from .define import operator
from .gradients import composed_gradients, pack, unpack


def composed(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The specification: LayerNorm in the dtype of ``hidden_state``, the product in the dtype of ``weight``."""
    normed = F.layer_norm(hidden_state, hidden_state.shape[-1:], norm_weight, norm_bias, eps)
    return F.linear(normed.to(weight.dtype), weight, bias)


@operator
def norm_linear(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    return composed(hidden_state, norm_weight, norm_bias, eps, weight, bias)


@operator
def norm_linear_bwd(
    dout: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    *need_norm, need_weight, need_bias = output_mask
    dim = hidden_state.shape[-1:]
    rows = dout.flatten(0, -2)
    dbias = rows.sum(0) if need_bias else None
    from_norm: Sequence[Tensor | None] = (None, None, None)
    run = optional("layer_norm_bwd", hidden_state, backend, norm=(norm_weight, norm_bias, eps))
    if any(need_norm) and not isinstance(run, str):
        normed, *from_norm = run(
            dout @ weight, hidden_state, norm_weight, norm_bias, eps, need_norm, weight.dtype if need_weight else None
        )
        dweight = rows.T @ normed.flatten(0, -2) if need_weight else None
        return pack([*from_norm, dweight, dbias], hidden_state)
    normed, mean, rstd = torch.native_layer_norm(hidden_state, dim, norm_weight, norm_bias, eps)
    dweight = rows.T @ normed.flatten(0, -2).to(weight.dtype) if need_weight else None
    if any(need_norm):
        dnormed = (dout @ weight).to(hidden_state.dtype)
        from_norm = torch.ops.aten.native_layer_norm_backward(
            dnormed, hidden_state, dim, mean, rstd, norm_weight, norm_bias, need_norm
        )
    return pack([*unpack(from_norm, need_norm), dweight, dbias], hidden_state)


@torch.library.register_fake("focalnet::norm_linear")
def _fake(
    hidden_state: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, *_: object
) -> Tensor:
    return weight.new_empty((*hidden_state.shape[:-1], weight.shape[0]))


@torch.library.register_fake("focalnet::norm_linear_bwd")
def _bwd_fake(
    dout: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: list[bool],
    *_: object,
) -> list[Tensor]:
    inputs = (hidden_state, norm_weight, norm_bias, weight, bias)
    pairs = zip(inputs, output_mask, strict=True)
    return pack([t.new_empty(t.shape) if want and t is not None else None for t, want in pairs], hidden_state)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_state, norm_weight, norm_bias, ctx.eps, weight, bias, backend = inputs
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
                dout.contiguous(), hidden_state, norm_weight, norm_bias, ctx.eps, weight, bias, mask, ctx.backend
            ),
            mask,
        )
    return (*gradients[:3], None, *gradients[3:], None)


torch.library.register_autograd("focalnet::norm_linear", _autograd, setup_context=_setup)

"""The MLP of a block, with or without the LayerNorm before it, as one operator that saves less for backward.

    norm_mlp(x) = Linear(GELU(Linear(LayerNorm(x))))          x (..., C) -> (..., hidden) -> (..., C)

With modules, autograd saves x, LayerNorm(x), fc1's output and its GELU: 2 C + 2 hidden elements per token. This
operator saves x and fc1's output, C + hidden elements, and recomputes the other two in backward, in one pass each.

If LayerNorm(x) has been computed already, by the same pass as x (`residual_norm`), the caller gives it as ``normed``.
The gradient then flows to ``normed`` and not to x. ``normed`` is still not saved, but recomputed from x.

On a CPU in float32 the kernels of csrc/cpu/gelu_rows.inc compute the bias and both GELUs: one pass over the hidden
units before the second product and one in backward, in place if possible.
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
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    normed: Tensor | None = None,
) -> Tensor:
    """The specification. ``eps`` None means no norm. The norm runs in ``hidden_state``'s dtype, the rest in the
    weights' dtype.
    """
    if normed is None:
        normed = _norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    return F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[LayerNorm(x), mean, 1 / standard deviation], or [x, None, None] without norm."""
    return (x, None, None) if eps is None else torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_bwd(
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


# ---- forward --------------------------------------------------------------------------------------------------------


@operator
def norm_mlp(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    normed: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The result (..., C), and fc1's output (..., hidden), which backward needs."""
    if normed is None:
        normed = _norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    fc1, act = _fc1_and_gelu(normed.flatten(0, -2), weight1, bias1, backend)
    leading = hidden_state.shape[:-1]
    return F.linear(act, weight2, bias2).view(*leading, weight2.shape[0]), fc1.view(*leading, weight1.shape[0])


def _fc1_and_gelu(normed: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    run = optional("bias_gelu", normed, backend)
    if isinstance(run, str):
        fc1 = F.linear(normed, weight, bias)
        return fc1, F.gelu(fc1)
    fc1 = normed @ weight.T
    act = torch.empty_like(fc1)
    run(fc1, bias, act)
    return fc1, act


# ---- backward -------------------------------------------------------------------------------------------------------


@operator
def norm_mlp_bwd(
    dout: Tensor,
    fc1: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    output_mask: list[bool],
    of_normed: bool = False,
    backend: str | None = None,
) -> list[Tensor]:
    """The gradients of all tensors in the order of the arguments.

    With ``of_normed`` the first is the gradient of ``normed`` instead of that of ``hidden_state``.
    """
    *need_norm, need_weight1, need_bias1, need_weight2, need_bias2 = output_mask
    dweight1 = dbias1 = dweight2 = None
    from_norm: Sequence[Tensor | None] = (None, None, None)
    x, dout, fc1 = (tensor.flatten(0, -2) for tensor in (hidden_state, dout, fc1))
    dbias2 = dout.sum(0) if need_bias2 else None
    if any((*need_norm, need_weight1, need_bias1, need_weight2)):
        act, dfc1 = _gelu_bwd(dout @ weight2, fc1, backend)
        dweight2 = dout.T @ act if need_weight2 else None
        del act
        dbias1 = dfc1.sum(0) if need_bias1 else None
    if need_weight1 or any(need_norm):
        run = _fc1_bwd_of_normed if of_normed else _fc1_bwd
        dweight1, dx, *dnorm = run(dfc1, x, norm_weight, norm_bias, eps, weight1, need_norm, need_weight1, backend)
        from_norm = (None if dx is None else dx.view_as(hidden_state), *dnorm)
    return pack([*from_norm, dweight1, dbias1, dweight2, dbias2], hidden_state)


def _fc1_bwd(
    dfc1: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    need_norm: list[bool],
    need_weight1: bool,
    backend: str | None,
) -> list[Tensor | None]:
    """[dweight1, dx, dnorm_weight, dnorm_bias]"""
    run = optional("layer_norm_bwd", x, backend, norm=(norm_weight, norm_bias, eps))
    if any(need_norm) and not isinstance(run, str):
        normed_dtype = dfc1.dtype if need_weight1 else None
        normed, *from_norm = run(dfc1 @ weight1, x, norm_weight, norm_bias, eps, need_norm, normed_dtype)
        return [dfc1.T @ normed if need_weight1 else None, *from_norm]
    normed, *statistics = _norm(x, norm_weight, norm_bias, eps)
    dweight1 = dfc1.T @ normed.to(dfc1.dtype) if need_weight1 else None
    if not any(need_norm):
        return [dweight1, None, None, None]
    return [dweight1, *_norm_bwd(dfc1 @ weight1, x, statistics, norm_weight, norm_bias, need_norm)]


def _fc1_bwd_of_normed(
    dfc1: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    need_norm: list[bool],
    need_weight1: bool,
    backend: str | None,
) -> list[Tensor | None]:
    """[dweight1, dnormed, None, None]"""
    dweight1 = None
    if need_weight1:
        dweight1 = dfc1.T @ _norm(x, norm_weight, norm_bias, eps)[0].to(dfc1.dtype)
    return [dweight1, dfc1 @ weight1 if need_norm[0] else None, None, None]


def _gelu_bwd(dact: Tensor, fc1: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """GELU(fc1) and dfc1. dfc1 may overwrite ``dact``."""
    run = optional("gelu_bwd", fc1, backend)
    if isinstance(run, str):
        return F.gelu(fc1), torch.ops.aten.gelu_backward(dact, fc1)
    act = torch.empty_like(fc1)
    run(dact, fc1, act)
    return act, dact


# ---- shapes without data --------------------------------------------------------------------------------------------


@torch.library.register_fake("focalnet::norm_mlp")
def _fake(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    leading = hidden_state.shape[:-1]
    return weight2.new_empty((*leading, weight2.shape[0])), weight1.new_empty((*leading, weight1.shape[0]))


@torch.library.register_fake("focalnet::norm_mlp_bwd")
def _bwd_fake(
    dout: Tensor,
    fc1: Tensor,
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    output_mask: list[bool],
    *_: object,
) -> list[Tensor]:
    inputs = (hidden_state, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    pairs = zip(inputs, output_mask, strict=True)
    return pack([t.new_empty(t.shape) if want and t is not None else None for t, want in pairs], hidden_state)


# ---- autograd -------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_state, norm_weight, norm_bias, ctx.eps, *weights, normed, backend = inputs
    ctx.backend = requested(backend)
    ctx.is_given = normed is not None
    ctx.save_for_backward(output[1], hidden_state, norm_weight, norm_bias, *weights)
    # fc1 has no gradient. Materialising zeros for it would cost a pass over the largest map.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 10
    fc1, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        *from_norm, dweight1, dbias1, dweight2, dbias2 = _differentiable(ctx, dout, tensors)
    else:
        need_hidden, need_weight, need_bias, _, *needs, need_normed = ctx.needs_input_grad[:9]
        need_norm = [need_normed, False, False] if ctx.is_given else [need_hidden, need_weight, need_bias]
        mask = [*need_norm, *needs]
        made = torch.ops.focalnet.norm_mlp_bwd(
            dout.contiguous(), fc1, *tensors[:3], ctx.eps, *tensors[3:], mask, ctx.is_given, ctx.backend
        )
        *from_norm, dweight1, dbias1, dweight2, dbias2 = unpack(made, mask)
    dnormed = None
    if ctx.is_given:
        dnormed, *from_norm = from_norm[0], None, None, None
    return (*from_norm, None, dweight1, dbias1, dweight2, dbias2, dnormed, None)


def _differentiable(ctx: Any, dout: Tensor, tensors: list[Any]) -> list[Tensor | None]:
    """The gradients, differentiable themselves."""
    hidden_state, norm_weight, norm_bias, *weights = tensors
    if not ctx.is_given:
        return composed_gradients(lambda x, g, s, *w: composed(x, g, s, ctx.eps, *w), tensors, dout)
    normed = _norm(hidden_state, norm_weight, norm_bias, ctx.eps)[0].to(weights[0].dtype)
    dnormed, *rest = composed_gradients(lambda n, *w: composed(n, None, None, None, *w), [normed, *weights], dout)
    return [dnormed, None, None, *rest]


torch.library.register_autograd("focalnet::norm_mlp", _autograd, setup_context=_setup)

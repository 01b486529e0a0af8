"""The MLP of a block, with or without the LayerNorm before it, as one operator that saves less for backward.

    norm_mlp(x) = Linear(GELU(Linear(LayerNorm(x))))          x (..., C) -> (..., hidden) -> (..., C)

With modules, autograd saves x, LayerNorm(x), fc1's output and its GELU: 2 C + 2 hidden elements per token. This
operator saves x and fc1's output, C + hidden elements, and recomputes the other two in backward, in one pass each.

If LayerNorm(x) has been computed already, by the same pass as x (`residual_norm`), the caller gives it as ``normed``.
The gradient then flows to ``normed`` and not to x. ``normed`` is still not saved, but recomputed from x.

On a CPU csrc/cpu/mlp_ops.cpp computes both products and the GELU together. The activations between them stay in the
caches: forward writes fc1's output and the result, backward the gradients alone.
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
from .norm_linear import linear_bwd, norm, norm_bwd


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
        normed = norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    return F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)


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
        normed = norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    run = optional("mlp_fwd", normed, backend, widths=_widths(weight1, weight2))
    if isinstance(run, str):
        fc1 = F.linear(normed, weight1, bias1)
        return F.linear(F.gelu(fc1), weight2, bias2), fc1
    leading = hidden_state.shape[:-1]
    out, fc1 = run(normed.flatten(0, -2), weight1, bias1, weight2, bias2)
    return out.view(*leading, weight2.shape[0]), fc1.view(*leading, weight1.shape[0])


def _widths(weight1: Tensor, weight2: Tensor) -> tuple[int, int]:
    return weight1.shape[0], weight2.shape[0]


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
    x, dout, fc1 = (tensor.flatten(0, -2) for tensor in (hidden_state, dout, fc1))
    affine = (norm_weight, norm_bias, eps)
    kernel = "normed is given" if of_normed else optional("layer_norm_bwd", x, backend, norm=affine)
    from_norm: Sequence[Tensor | None]
    if any(need_norm) and not isinstance(kernel, str):
        # The kernel makes normed anew, so it comes before the gradient of fc1's weight.
        dfc1, dweight2, dbias2 = _fc2_bwd(dout, fc1, weight2, [True, need_weight2, need_bias2])
        normed, *from_norm = kernel(dfc1 @ weight1, x, *affine, need_norm, dfc1.dtype if need_weight1 else None)
        dweight1 = dfc1.T @ normed if need_weight1 else None
        dweights = [dweight1, dfc1.sum(0) if need_bias1 else None, dweight2, dbias2]
    else:
        is_used = need_weight1 or (any(need_norm) and not of_normed)
        normed, *statistics = norm(x, *affine) if is_used else (x, None, None)
        mask = [any(need_norm), need_weight1, need_bias1, need_weight2, need_bias2]
        dnormed, *dweights = _mlp_bwd(dout, normed.to(dout.dtype), fc1, weight1, weight2, mask, backend)
        from_norm = (dnormed, None, None)
        if dnormed is not None and not of_normed:
            from_norm = norm_bwd(dnormed, x, statistics, norm_weight, norm_bias, need_norm)
    dx, *dnorm = from_norm
    return pack([None if dx is None else dx.view_as(hidden_state), *dnorm, *dweights], hidden_state)


def _mlp_bwd(
    dout: Tensor,
    rows: Tensor,
    fc1: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    mask: list[bool],
    backend: str | None,
) -> list[Tensor | None]:
    """[drows, dweight1, dbias1, dweight2, dbias2] of ``rows`` (n, C); ``mask`` selects among them."""
    run = optional("mlp_bwd", dout, backend, widths=_widths(weight1, weight2))
    if not isinstance(run, str):
        return run(dout, rows, fc1, weight1, weight2, mask)
    need_first, need_second = mask[:3], mask[3:]
    dfc1, *second = _fc2_bwd(dout, fc1, weight2, [any(need_first), *need_second])
    first = [None] * 3 if dfc1 is None else linear_bwd(dfc1, rows, weight1, need_first, backend)
    return [*first, *second]


def _fc2_bwd(dout: Tensor, fc1: Tensor, weight: Tensor, mask: list[bool]) -> list[Any]:
    """[dfc1, dweight2, dbias2] of the GELU and the second layer; ``mask`` selects among them."""
    need_fc1, need_weight, need_bias = mask
    return [
        torch.ops.aten.gelu_backward(dout @ weight, fc1) if need_fc1 else None,
        dout.T @ F.gelu(fc1) if need_weight else None,
        dout.sum(0) if need_bias else None,
    ]


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
    normed = norm(hidden_state, norm_weight, norm_bias, ctx.eps)[0].to(weights[0].dtype)
    dnormed, *rest = composed_gradients(lambda n, *w: composed(n, None, None, None, *w), [normed, *weights], dout)
    return [dnormed, None, None, *rest]


torch.library.register_autograd("focalnet::norm_mlp", _autograd, setup_context=_setup)

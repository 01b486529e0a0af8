"""The MLP of a block, with or without the LayerNorm before it, as one operator that saves little for backward.

    normed_mlp(x) = Linear(GELU(Linear(LayerNorm(x))))          x (..., C) -> (..., hidden) -> (..., C)

Composed of modules, autograd keeps x, LayerNorm(x), fc1's output and its GELU: 2 C + 2 hidden elements a token. Here x
and fc1's output are kept, C + hidden, and the other two computed once more in backward, a pass each.

On a CPU in float32 the bias and both GELUs are the kernels of csrc/cpu/gelu_rows.inc: one pass over the hidden units
before the second product, one in backward, in place where that is possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension
from .gradients import pack, unpack
from .normed_linear import composed_gradients

_TENSORS = (
    "Tensor hidden_state, Tensor? norm_weight, Tensor? norm_bias, float? eps, "
    "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
)
_PT2 = (torch.Tag.pt2_compliant_tag,)
torch.library.define("focalnet::normed_mlp", f"({_TENSORS}) -> (Tensor out, Tensor fc1)", tags=_PT2)
torch.library.define(
    "focalnet::normed_mlp_bwd", f"(Tensor dout, Tensor fc1, {_TENSORS}, bool[] output_mask) -> Tensor[]", tags=_PT2
)


def composed(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """The specification. ``eps`` None: no norm. The norm has ``hidden_state``'s dtype, the rest that of weights."""
    normed = _norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    return F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Sequence[Tensor | None]:
    """LayerNorm(x), and the mean and 1 / deviation it took; x itself without norm."""
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


def _runs_compiled(tensor: Tensor) -> bool:
    """Whether csrc/cpu has the GELU for this tensor."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and extension.missing() is None


# ---- forward --------------------------------------------------------------------------------------------------------


@torch.library.impl("focalnet::normed_mlp", "CompositeExplicitAutograd")
def _forward(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    normed = _norm(hidden_state, norm_weight, norm_bias, eps)[0].to(weight1.dtype)
    fc1, act = _fc1_and_gelu(normed.flatten(0, -2), weight1, bias1)
    leading = hidden_state.shape[:-1]
    return F.linear(act, weight2, bias2).view(*leading, weight2.shape[0]), fc1.view(*leading, weight1.shape[0])


def _fc1_and_gelu(normed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if not _runs_compiled(normed):
        fc1 = F.linear(normed, weight, bias)
        return fc1, F.gelu(fc1)
    fc1 = normed @ weight.T
    act = torch.empty_like(fc1)
    torch.ops.focalnet.cpu_bias_gelu_(fc1, bias, act)
    return fc1, act


# ---- backward -------------------------------------------------------------------------------------------------------


@torch.library.impl("focalnet::normed_mlp_bwd", "CompositeExplicitAutograd")
def _backward(
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
) -> list[Tensor]:
    *need_norm, need_weight1, need_bias1, need_weight2, need_bias2 = output_mask
    dweight1 = dbias1 = dweight2 = None
    from_norm: Sequence[Tensor | None] = (None, None, None)
    x, dout, fc1 = (tensor.flatten(0, -2) for tensor in (hidden_state, dout, fc1))
    dbias2 = dout.sum(0) if need_bias2 else None
    if any((*need_norm, need_weight1, need_bias1, need_weight2)):
        act, dfc1 = _gelu_bwd(dout @ weight2, fc1)
        dweight2 = dout.T @ act if need_weight2 else None
        del act
        dbias1 = dfc1.sum(0) if need_bias1 else None
    if need_weight1 or any(need_norm):
        normed, *statistics = _norm(x, norm_weight, norm_bias, eps)
        dweight1 = dfc1.T @ normed.to(dfc1.dtype) if need_weight1 else None
    if any(need_norm):
        dx, *dnorm = _norm_bwd(dfc1 @ weight1, x, statistics, norm_weight, norm_bias, need_norm)
        from_norm = (None if dx is None else dx.view_as(hidden_state), *dnorm)
    return pack([*from_norm, dweight1, dbias1, dweight2, dbias2], hidden_state)


def _gelu_bwd(dact: Tensor, fc1: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(fc1) and dfc1; the latter may take the place of ``dact``."""
    if not _runs_compiled(fc1):
        return F.gelu(fc1), torch.ops.aten.gelu_backward(dact, fc1)
    act = torch.empty_like(fc1)
    torch.ops.focalnet.cpu_gelu_backward_(dact, fc1, act)
    return act, dact


# ---- shapes without data --------------------------------------------------------------------------------------------


@torch.library.register_fake("focalnet::normed_mlp")
def _forward_fake(
    hidden_state: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    leading = hidden_state.shape[:-1]
    return weight2.new_empty((*leading, weight2.shape[0])), weight1.new_empty((*leading, weight1.shape[0]))


@torch.library.register_fake("focalnet::normed_mlp_bwd")
def _backward_fake(
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
) -> list[Tensor]:
    inputs = (hidden_state, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    wanted = zip(inputs, output_mask, strict=True)
    return pack([tensor.new_empty(tensor.shape) if want else None for tensor, want in wanted], hidden_state)


# ---- autograd -------------------------------------------------------------------------------------------------------


def _setup(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden_state, norm_weight, norm_bias, ctx.eps, *weights = inputs
    ctx.save_for_backward(output[1], hidden_state, norm_weight, norm_bias, *weights)
    ctx.set_materialize_grads(
        False
    )  # nobody has a gradient for fc1: zeros for it would be a pass over the largest map


def _autograd(ctx: object, dout: Tensor | None, _: Tensor | None) -> tuple:
    if dout is None:
        return (None,) * 8
    fc1, *tensors = ctx.saved_tensors
    norm, weights = tensors[:3], tensors[3:]
    if torch.is_grad_enabled():
        gradients = composed_gradients(lambda x, g, s, *w: composed(x, g, s, ctx.eps, *w), tensors, dout)
    else:
        mask = [need for at, need in enumerate(ctx.needs_input_grad) if at != 3]
        gradients = unpack(
            torch.ops.focalnet.normed_mlp_bwd(dout.contiguous(), fc1, *norm, ctx.eps, *weights, mask), mask
        )
    return (*gradients[:3], None, *gradients[3:])


torch.library.register_autograd("focalnet::normed_mlp", _autograd, setup_context=_setup)

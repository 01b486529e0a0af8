"""The end of a residual branch and the LayerNorm that follows it, as one operator.

    out = hidden_state + kept / keep * gamma * update          normed = LayerNorm(out)          all (B, ..., C)

gamma and kept as in `residual`. Saved for backward: out, which the next residual keeps anyway, and update where gamma
needs it; not normed, and no statistics.

On a GPU it is a pass of kernels/residual_norm.py; elsewhere `composed`, the specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.problem import Problem
from ..backends.registry import optional, requested
from .define import operator
from .gradients import composed_gradients, pack, unpack
from .residual import scaled


def composed(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The specification: out in the dtype of ``hidden_state``, normed in ``norm_dtype``."""
    out = (hidden_state + scaled(update, gamma, kept, keep)).to(hidden_state.dtype)
    return out, F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias, eps).to(norm_dtype)


@operator
def residual_norm(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    run = optional(Problem.of_rows("residual_norm", hidden_state, norm_weight, norm_bias, eps), backend)
    run = composed if isinstance(run, str) else run
    return run(hidden_state, update, gamma, kept, keep, norm_weight, norm_bias, eps, norm_dtype)


@operator
def residual_norm_bwd(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    """[dhidden_state, dupdate, gradients of norm_weight, norm_bias and, where there is one, gamma (number, C)]"""
    run = optional(Problem.of_rows("residual_norm_bwd", out, norm_weight, norm_bias, eps), backend)
    run = _composed_bwd if isinstance(run, str) else run
    made = run(dout, dnormed, out, update, gamma, kept, keep, norm_weight, norm_bias, eps, update_dtype, output_mask)
    return pack(made, out)


def _composed_bwd(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
) -> list[Tensor | None]:
    need_hidden, need_update, need_parameters = output_mask
    dim = out.shape[-1:]
    _, *statistics = torch.native_layer_norm(out, dim, norm_weight, norm_bias, eps)
    dhidden, *dparameters = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(out.dtype), out, dim, *statistics, norm_weight, norm_bias, [True, need_parameters, need_parameters]
    )
    dhidden = dout + dhidden
    dbranch = scaled(dhidden, None, kept, keep)
    if gamma is not None and need_parameters:
        dparameters.append((dbranch * update).flatten(0, -2).sum(0))
    dupdate = scaled(dbranch, gamma, None, 1.0).to(update_dtype) if need_update else None
    return [dhidden if need_hidden else None, dupdate, torch.stack(dparameters) if need_parameters else None]


@torch.library.register_fake("focalnet::residual_norm")
def _fake(hidden_state: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    norm_dtype = arguments[7]
    return hidden_state.new_empty(hidden_state.shape), hidden_state.new_empty(hidden_state.shape, dtype=norm_dtype)


@torch.library.register_fake("focalnet::residual_norm_bwd")
def _bwd_fake(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
    *_: object,
) -> list[Tensor]:
    need_hidden, need_update, need_parameters = output_mask
    dhidden = out.new_empty(out.shape) if need_hidden else None
    dupdate = out.new_empty(out.shape, dtype=update_dtype) if need_update else None
    sums = norm_weight.new_empty(2 if gamma is None else 3, out.shape[-1]) if need_parameters else None
    return pack([dhidden, dupdate, sums], out)


def _setup(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, update, gamma, kept, ctx.keep, norm_weight, norm_bias, ctx.eps, _, backend = inputs
    ctx.backend = requested(backend)
    ctx.update_dtype = update.dtype
    ctx.save_for_backward(output[0], None if gamma is None else update, gamma, kept, norm_weight, norm_bias)


def _autograd(ctx: object, dout: Tensor, dnormed: Tensor) -> tuple:
    need_hidden, need_update, need_gamma, _, _, *need_norm, _, _ = ctx.needs_input_grad[:9]
    if torch.is_grad_enabled():
        dhidden, dupdate, dgamma, dweight, dbias = _differentiable(ctx, dout, dnormed)
        return dhidden, dupdate, dgamma, None, None, dweight, dbias, None, None, None
    out, update, gamma, kept, norm_weight, norm_bias = ctx.saved_tensors
    # Where nothing scales the branch, both gradients are one tensor.
    is_one = gamma is None and kept is None and ctx.update_dtype == out.dtype
    mask = [need_hidden or (is_one and need_update), need_update and not is_one, need_gamma or any(need_norm)]
    made = torch.ops.focalnet.residual_norm_bwd(
        dout,
        dnormed,
        out,
        update,
        gamma,
        kept,
        ctx.keep,
        norm_weight,
        norm_bias,
        ctx.eps,
        ctx.update_dtype,
        mask,
        ctx.backend,
    )
    dhidden, dupdate, sums = unpack(made, mask)
    dweight, dbias, dgamma = (None, None, None) if sums is None else (*sums.unbind(), None)[:3]
    return dhidden, dhidden if is_one else dupdate, dgamma, None, None, dweight, dbias, None, None, None


def _differentiable(ctx: object, dout: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of hidden_state, update, gamma, norm_weight and norm_bias that have gradients themselves."""
    out, update, gamma, kept, norm_weight, norm_bias = ctx.saved_tensors

    def norm(out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(out, out.shape[-1:], weight, bias, ctx.eps).to(dnormed.dtype)

    dnorm, dweight, dbias = composed_gradients(norm, [out, norm_weight, norm_bias], dnormed)
    dhidden = dout if dnorm is None else dout + dnorm
    if gamma is None:
        return dhidden, scaled(dhidden, None, kept, ctx.keep), None, dweight, dbias

    def branch(update: Tensor, gamma: Tensor) -> Tensor:
        return scaled(update, gamma, kept, ctx.keep).to(dhidden.dtype)

    return dhidden, *composed_gradients(branch, [update, gamma], dhidden), dweight, dbias


torch.library.register_autograd("focalnet::residual_norm", _autograd, setup_context=_setup)

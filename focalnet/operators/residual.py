"""The end of a residual branch as one operator, with the LayerNorm after the branch or the LayerNorm after the sum.

    residual       out = hidden_state + kept / keep * gamma * LayerNorm(update)                      all (B, ..., C)
    residual_norm  out = hidden_state + kept / keep * gamma * update,  normed = LayerNorm(out)

gamma (C,) is the layer scale. kept (B, 1, ...) is 1 for samples whose branch is kept and 0 for the others, drawn with
probability ``keep`` (stochastic depth). gamma, kept and the norm of `residual` are optional.

`residual` saves update for backward, and only if gamma or the norm needs it. `residual_norm` saves out, which the next
residual saves anyway, and update if gamma needs it. Neither saves normed or the statistics of the norm.

On a GPU each is one pass over memory (kernels/residual.py, kernels/residual_norm.py). Elsewhere the specifications
`composed` and `composed_norm` run.
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

# ---- residual -------------------------------------------------------------------------------------------------------


def composed(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The specification of `residual`, in the dtype of ``hidden_state``. ``norm_weight`` None means no norm."""
    if norm_weight is not None:
        update = F.layer_norm(update.to(norm_weight.dtype), update.shape[-1:], norm_weight, norm_bias, eps)
    return (hidden_state + scaled(update, gamma, kept, keep)).to(hidden_state.dtype)


def scaled(update: Tensor, gamma: Tensor | None, kept: Tensor | None, keep: float) -> Tensor:
    """Apply layer scale and stochastic depth to the update of a branch, or to its gradient."""
    if gamma is not None:
        update = gamma * update
    return update if kept is None else update.div(keep) * kept


@operator
def residual(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    run = optional("residual", hidden_state, backend)
    run = composed if isinstance(run, str) else run
    return run(hidden_state, update, gamma, kept, keep, norm_weight, norm_bias, eps)


@operator
def residual_bwd(
    dout: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    """[dupdate, gradients (number, C)]: the gradients are those of gamma, norm_weight and norm_bias that are given."""
    run = optional("residual_bwd", dout, backend)
    run = _composed_bwd if isinstance(run, str) else run
    made = run(dout, update, gamma, kept, keep, norm_weight, norm_bias, eps, update_dtype, output_mask)
    return pack(made, dout)


def _composed_bwd(
    dout: Tensor,
    update: Any,  # a tensor where gamma or the norm needs it
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
) -> list[Tensor | None]:
    need_update, need_parameters = output_mask
    branch, dbranch = update, scaled(dout, None, kept, keep)
    dnorm: list[Any] = []
    statistics: Sequence[Tensor] = ()
    if norm_weight is not None:
        update = update.to(norm_weight.dtype)
        branch, *statistics = torch.native_layer_norm(update, update.shape[-1:], norm_weight, norm_bias, eps)
    dgamma = [(dbranch * branch).flatten(0, -2).sum(0)] if gamma is not None and need_parameters else []
    dupdate: Any = dbranch if gamma is None else gamma * dbranch
    if norm_weight is not None:
        mask = [need_update, need_parameters, need_parameters]
        dupdate, *dnorm = unpack(
            torch.ops.aten.native_layer_norm_backward(
                dupdate.to(update.dtype), update, update.shape[-1:], *statistics, norm_weight, norm_bias, mask
            ),
            mask,
        )
    sums = torch.stack([*dgamma, *dnorm]) if need_parameters else None
    return [dupdate.to(update_dtype) if need_update else None, sums]


@torch.library.register_fake("focalnet::residual")
def _fake(hidden_state: Tensor, *_: object) -> Tensor:
    return hidden_state.new_empty(hidden_state.shape)


@torch.library.register_fake("focalnet::residual_bwd")
def _bwd_fake(
    dout: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
    *_: object,
) -> list[Tensor]:
    need_update, need_parameters = output_mask
    dupdate = dout.new_empty(dout.shape, dtype=update_dtype) if need_update else None
    parameters = [p for p in (gamma, norm_weight, norm_bias) if p is not None]
    sums = parameters[0].new_empty(len(parameters), dout.shape[-1]) if need_parameters else None
    return pack([dupdate, sums], dout)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, update, gamma, kept, ctx.keep, norm_weight, norm_bias, ctx.eps, backend = inputs
    ctx.backend = requested(backend)
    ctx.update_dtype = update.dtype
    is_needed = gamma is not None or norm_weight is not None
    ctx.save_for_backward(update if is_needed else None, gamma, kept, norm_weight, norm_bias)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    update, gamma, kept, norm_weight, norm_bias = ctx.saved_tensors
    need_hidden, need_update, need_gamma, _, _, *need_norm, _ = ctx.needs_input_grad[:8]
    if torch.is_grad_enabled():
        dupdate, dgamma, *dnorm = _differentiable(ctx, dout, update, gamma, kept, norm_weight, norm_bias)
    else:
        need_parameters = need_gamma or any(need_norm)
        mask = [need_update, need_parameters]
        made = torch.ops.focalnet.residual_bwd(
            dout, update, gamma, kept, ctx.keep, norm_weight, norm_bias, ctx.eps, ctx.update_dtype, mask, ctx.backend
        )
        dupdate, sums = unpack(made, mask)
        rows = iter(() if sums is None else sums.unbind())
        dgamma, *dnorm = (None if p is None else next(rows, None) for p in (gamma, norm_weight, norm_bias))
    return dout if need_hidden else None, dupdate, dgamma, None, None, *dnorm, None, None


def _differentiable(
    ctx: Any, dout: Tensor, update: Tensor | None, gamma: Tensor | None, kept: Tensor | None, *norm: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of update, gamma, norm_weight and norm_bias."""
    if update is None:
        return [scaled(dout, None, kept, ctx.keep), None, None, None]

    def branch(update: Tensor, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # The residual is left out because its gradient is dout.
        return composed(torch.zeros_like(dout), update, gamma, kept, ctx.keep, weight, bias, ctx.eps)

    return composed_gradients(branch, [update, gamma, *norm], dout)


torch.library.register_autograd("focalnet::residual", _autograd, setup_context=_setup)


# ---- residual_norm --------------------------------------------------------------------------------------------------


def composed_norm(
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
    """The specification of `residual_norm`: out in the dtype of ``hidden_state``, normed in ``norm_dtype``."""
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
    run = optional("residual_norm", hidden_state, backend, norm=(norm_weight, norm_bias, eps))
    run = composed_norm if isinstance(run, str) else run
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
    """[dhidden_state, dupdate, gradients (number, C)]: those of norm_weight, norm_bias and, if given, gamma."""
    run = optional("residual_norm_bwd", out, backend, norm=(norm_weight, norm_bias, eps))
    run = _composed_norm_bwd if isinstance(run, str) else run
    made = run(dout, dnormed, out, update, gamma, kept, keep, norm_weight, norm_bias, eps, update_dtype, output_mask)
    return pack(made, out)


def _composed_norm_bwd(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    update: Any,  # a tensor where gamma needs it
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
def _norm_fake(hidden_state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    norm_dtype = arguments[7]
    return hidden_state.new_empty(hidden_state.shape), hidden_state.new_empty(hidden_state.shape, dtype=norm_dtype)


@torch.library.register_fake("focalnet::residual_norm_bwd")
def _norm_bwd_fake(
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


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, update, gamma, kept, ctx.keep, norm_weight, norm_bias, ctx.eps, _, backend = inputs
    ctx.backend = requested(backend)
    ctx.update_dtype = update.dtype
    ctx.save_for_backward(output[0], None if gamma is None else update, gamma, kept, norm_weight, norm_bias)


def _norm_autograd(ctx: Any, dout: Tensor, dnormed: Tensor) -> tuple[Any, ...]:
    need_hidden, need_update, need_gamma, _, _, *need_norm, _, _ = ctx.needs_input_grad[:9]
    if torch.is_grad_enabled():
        dhidden, dupdate, dgamma, dweight, dbias = _norm_differentiable(ctx, dout, dnormed)
        return dhidden, dupdate, dgamma, None, None, dweight, dbias, None, None, None
    out, update, gamma, kept, norm_weight, norm_bias = ctx.saved_tensors
    # If nothing scales the branch, dhidden_state and dupdate are equal and share one tensor.
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


def _norm_differentiable(ctx: Any, dout: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of hidden_state, update, gamma, norm_weight and norm_bias."""
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


torch.library.register_autograd("focalnet::residual_norm", _norm_autograd, setup_context=_norm_setup)

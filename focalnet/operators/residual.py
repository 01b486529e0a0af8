"""The end of a residual branch as one operator, with the LayerNorm behind the branch if there is one.

    residual(hidden_state, update) = hidden_state + kept / keep * gamma * LayerNorm(update)          all (B, ..., C)

gamma (C,) is the layer scale; kept (B, 1, ...) is 1 for samples whose branch stays and 0 for the others, drawn with
probability ``keep`` (stochastic depth). Each of them may be missing. Saved for backward: update, and only where gamma
or the norm needs it.

On a GPU it is a pass of kernels/residual.py; elsewhere `composed`, the specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.problem import Problem
from ..backends.registry import optional, requested
from .define import operator
from .gradients import composed_gradients, pack, unpack


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
    """The specification, in the dtype of ``hidden_state``; ``norm_weight`` None: no norm."""
    if norm_weight is not None:
        update = F.layer_norm(update.to(norm_weight.dtype), update.shape[-1:], norm_weight, norm_bias, eps)
    return (hidden_state + scaled(update, gamma, kept, keep)).to(hidden_state.dtype)


def scaled(update: Tensor, gamma: Tensor | None, kept: Tensor | None, keep: float) -> Tensor:
    """Layer scale and stochastic depth of a branch, and of the gradient on its way back."""
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
    run = optional(Problem.of_rows("residual", hidden_state), backend)
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
    """[dupdate, gradients (number, C) of gamma, norm_weight and norm_bias, of those that there are]"""
    run = optional(Problem.of_rows("residual_bwd", dout), backend)
    run = _composed_bwd if isinstance(run, str) else run
    made = run(dout, update, gamma, kept, keep, norm_weight, norm_bias, eps, update_dtype, output_mask)
    return pack(made, dout)


def _composed_bwd(
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
) -> list[Tensor | None]:
    need_update, need_parameters = output_mask
    branch, dbranch = update, scaled(dout, None, kept, keep)
    dnorm: list[Tensor] = []
    statistics: tuple[Tensor, ...] = ()
    if norm_weight is not None:
        update = update.to(norm_weight.dtype)
        branch, *statistics = torch.native_layer_norm(update, update.shape[-1:], norm_weight, norm_bias, eps)
    dgamma = [(dbranch * branch).flatten(0, -2).sum(0)] if gamma is not None and need_parameters else []
    dupdate = dbranch if gamma is None else gamma * dbranch
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


def _setup(ctx: object, inputs: tuple, output: Tensor) -> None:
    _, update, gamma, kept, ctx.keep, norm_weight, norm_bias, ctx.eps, backend = inputs
    ctx.backend = requested(backend)
    ctx.update_dtype = update.dtype
    is_needed = gamma is not None or norm_weight is not None
    ctx.save_for_backward(update if is_needed else None, gamma, kept, norm_weight, norm_bias)


def _autograd(ctx: object, dout: Tensor) -> tuple:
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
    ctx: object, dout: Tensor, update: Tensor | None, gamma: Tensor | None, kept: Tensor | None, *norm: Tensor
) -> list[Tensor | None]:
    """Gradients of update, gamma, norm_weight and norm_bias that have gradients themselves."""
    if update is None:
        return [scaled(dout, None, kept, ctx.keep), None, None, None]

    def branch(update: Tensor, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # Without the residual: its gradient is dout.
        return composed(torch.zeros_like(dout), update, gamma, kept, ctx.keep, weight, bias, ctx.eps)

    return composed_gradients(branch, [update, gamma, *norm], dout)


torch.library.register_autograd("focalnet::residual", _autograd, setup_context=_setup)

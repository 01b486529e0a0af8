"""Focal modulation and gated aggregation as operators of torch.library.

The file holds schemas, fake tensors and autograd. Each function of `focalnet.functional` has one operator for forward
and one for backward. An operator chooses its backend in its body, so a compiled graph contains one node for any
backend. Backward recomputes the focal levels: only the inputs are saved, which are usually views of one packed
projection.

`packed_focal_modulation` takes that projection itself. Then its gradient is one tensor, and kernels write dq, dctx and
dgates into it. Autograd would have to concatenate three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends.registry import choose, requested
from .define import operator
from .gradients import pack, unpack
from .norm_linear import padded_empty

# ---- implementations ------------------------------------------------------------------------------------------------


@operator
def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: list[Tensor], normalize_modulator: bool, backend: str | None
) -> Tensor:
    run = choose("gated_aggregation", ctx, focal_weights, backend)
    return run(ctx, gates, focal_weights, normalize_modulator)


@operator
def focal_modulation(
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    backend: str | None,
) -> Tensor:
    run = choose("focal_modulation", ctx, focal_weights, backend)
    return run(q, ctx, gates, focal_weights, weight, bias, normalize_modulator)


@operator
def gated_aggregation_bwd(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: list[Tensor],
    normalize_modulator: bool,
    output_mask: list[bool],
    backend: str | None,
) -> list[Tensor]:
    run = choose("gated_aggregation_bwd", ctx, focal_weights, backend)
    return pack(run(dagg, ctx, gates, focal_weights, normalize_modulator, output_mask), ctx)


@operator
def focal_modulation_bwd(
    dout: Tensor,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: list[bool],
    backend: str | None,
) -> list[Tensor]:
    run = choose("focal_modulation_bwd", ctx, focal_weights, backend)
    return pack(run(dout, q, ctx, gates, focal_weights, weight, bias, normalize_modulator, output_mask), ctx)


@operator
def packed_focal_modulation(
    projected: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    backend: str | None,
) -> Tensor:
    """`focal_modulation` of the three parts of ``projected`` (B, H, W, 2C + L + 1): q, ctx and gates."""
    q, ctx, gates = _parts(projected, weight)
    run = choose("focal_modulation", ctx, focal_weights, backend)
    return run(q, ctx, gates, focal_weights, weight, bias, normalize_modulator)


@operator
def packed_focal_modulation_bwd(
    dout: Tensor,
    projected: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: list[bool],
    backend: str | None,
) -> list[Tensor]:
    """[dprojected, dweight, dbias, *dfocal_weights]; the rows of dprojected are padded (see `padded_empty`)."""
    need_projected, *needs = output_mask
    q, ctx, gates = _parts(projected, weight)
    dprojected = _gradient_of(projected, need_projected)
    out = _parts(dprojected, weight) if need_projected else None
    run = choose("focal_modulation_bwd", ctx, focal_weights, backend, out)
    mask = [need_projected] * 3 + needs
    gradients = run(dout, q, ctx, gates, focal_weights, weight, bias, normalize_modulator, mask)
    for part, gradient in zip(out or (), gradients, strict=False):
        if gradient is not part:
            part.copy_(gradient)
    return [dprojected, *pack(gradients[3:], projected)]


def _gradient_of(projected: Tensor, wanted: bool) -> Tensor:
    return padded_empty(projected, projected.shape) if wanted else projected.new_empty(0)


def _parts(projected: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    channels = weight.shape[0]
    return projected.split([channels, channels, projected.shape[-1] - 2 * channels], dim=-1)


# ---- shapes without data --------------------------------------------------------------------------------------------


@torch.library.register_fake("focalnet::gated_aggregation")
@torch.library.register_fake("focalnet::focal_modulation")
def _fake(like: Tensor, *_: object) -> Tensor:
    return like.new_empty(like.shape)


@torch.library.register_fake("focalnet::gated_aggregation_bwd")
def _gated_aggregation_bwd_fake(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: list[Tensor],
    _: bool,
    output_mask: list[bool],
    *rest: object,
) -> list[Tensor]:
    need_ctx, need_gates, need_focal = output_mask
    wanted = [need_ctx, need_gates, *[need_focal] * len(focal_weights)]
    return _fake_gradients([ctx, gates, *focal_weights], wanted, ctx)


@torch.library.register_fake("focalnet::focal_modulation_bwd")
def _focal_modulation_bwd_fake(
    dout: Tensor,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: list[bool],
    *rest: object,
) -> list[Tensor]:
    *needs, need_focal = output_mask
    bias_like = weight[0] if bias is None else bias
    wanted = [*needs, *[need_focal] * len(focal_weights)]
    return _fake_gradients([q, ctx, gates, weight, bias_like, *focal_weights], wanted, ctx)


@torch.library.register_fake("focalnet::packed_focal_modulation")
def _packed_fake(projected: Tensor, focal_weights: list[Tensor], weight: Tensor, *_: object) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], weight.shape[0]))


@torch.library.register_fake("focalnet::packed_focal_modulation_bwd")
def _packed_bwd_fake(
    dout: Tensor,
    projected: Tensor,
    focal_weights: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: list[bool],
    *rest: object,
) -> list[Tensor]:
    need_projected, need_weight, need_bias, need_focal = output_mask
    bias_like = weight[0] if bias is None else bias
    wanted = [need_weight, need_bias, *[need_focal] * len(focal_weights)]
    dprojected = _gradient_of(projected, need_projected)
    return [dprojected, *_fake_gradients([weight, bias_like, *focal_weights], wanted, projected)]


def _fake_gradients(inputs: list[Tensor], wanted: list[bool], like: Tensor) -> list[Tensor]:
    return [like.new_empty(tensor.shape if want else 0) for tensor, want in zip(inputs, wanted, strict=True)]


# ---- autograd -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, tensors: Sequence[Tensor | None], normalize_modulator: bool, backend: str | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.normalize_modulator = normalize_modulator
    # Read now: backward may run on another thread, or after the `with use_backend(...)` block has ended.
    ctx.backend = requested(backend)


def _gated_aggregation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, gates, focal_weights, normalize_modulator, backend = inputs
    _save(ctx, (context, gates, *focal_weights), normalize_modulator, backend)


def _gated_aggregation_autograd(ctx: Any, dagg: Tensor) -> tuple[Any, ...]:
    context, gates, *focal_weights = ctx.saved_tensors
    need_ctx, need_gates, need_focal, *_ = ctx.needs_input_grad
    mask = [need_ctx, need_gates, any(need_focal)]
    gradients = torch.ops.focalnet.gated_aggregation_bwd(
        dagg, context, gates, focal_weights, ctx.normalize_modulator, mask, ctx.backend
    )
    dctx, dgates, *dfocal_weights = unpack(gradients, [need_ctx, need_gates, *need_focal])
    return dctx, dgates, dfocal_weights, None, None


def _focal_modulation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, context, gates, focal_weights, weight, bias, normalize_modulator, backend = inputs
    _save(ctx, (q, context, gates, weight, bias, *focal_weights), normalize_modulator, backend)


def _focal_modulation_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    q, context, gates, weight, bias, *focal_weights = ctx.saved_tensors
    need_q, need_ctx, need_gates, need_focal, need_weight, need_bias, *_ = ctx.needs_input_grad
    needs = [need_q, need_ctx, need_gates, need_weight, need_bias]
    gradients = torch.ops.focalnet.focal_modulation_bwd(
        dout,
        q,
        context,
        gates,
        focal_weights,
        weight,
        bias,
        ctx.normalize_modulator,
        [*needs, any(need_focal)],
        ctx.backend,
    )
    dq, dctx, dgates, dweight, dbias, *dfocal_weights = unpack(gradients, [*needs, *need_focal])
    return dq, dctx, dgates, dfocal_weights, dweight, dbias, None, None


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    projected, focal_weights, weight, bias, normalize_modulator, backend = inputs
    _save(ctx, (projected, weight, bias, *focal_weights), normalize_modulator, backend)


def _packed_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    projected, weight, bias, *focal_weights = ctx.saved_tensors
    need_projected, need_focal, need_weight, need_bias, *_ = ctx.needs_input_grad
    wanted = [need_projected, need_weight, need_bias]
    mask = [*wanted, any(need_focal)]
    rest = (focal_weights, weight, bias, ctx.normalize_modulator)
    if torch.is_grad_enabled():  # gradients of gradients: those of the operator on three tensors have some
        mask = [need_projected] * 2 + mask
        parts = _parts(projected, weight)
        gradients = torch.ops.focalnet.focal_modulation_bwd(dout, *parts, *rest, mask, ctx.backend)
        packed = torch.cat(gradients[:3], -1) if need_projected else None
        gradients = [packed, *gradients[3:]]
    else:
        gradients = torch.ops.focalnet.packed_focal_modulation_bwd(dout, projected, *rest, mask, ctx.backend)
    dprojected, dweight, dbias, *dfocal_weights = unpack(gradients, [*wanted, *need_focal])
    return dprojected, dfocal_weights, dweight, dbias, None, None


for _name, _backward, _setup in (
    ("packed_focal_modulation", _packed_autograd, _packed_setup),
    ("gated_aggregation", _gated_aggregation_autograd, _gated_aggregation_setup),
    ("focal_modulation", _focal_modulation_autograd, _focal_modulation_setup),
):
    torch.library.register_autograd(f"focalnet::{_name}", _backward, setup_context=_setup)


# ---- gradients of gradients: the reference's backward is plain PyTorch, so autograd differentiates it ---------------


def _map_tensors(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """Apply ``function`` to every tensor of an argument list, also inside nested lists."""
    mapped = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            mapped.append(_map_tensors(function, argument))
        else:
            mapped.append(function(argument) if isinstance(argument, Tensor) else argument)
    return mapped


def _double_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors: list[Tensor] = []

    def save(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    *arguments, output_mask, _ = inputs
    ctx.positions = _map_tensors(save, arguments)
    ctx.output_mask = output_mask
    ctx.save_for_backward(*tensors)


def _restore(positions: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """Rebuild the argument list that `_double_setup` split. Positions are ints; flags are bools and become None."""
    restored: list[Any] = []
    for position in positions:
        if isinstance(position, list):
            restored.append(_restore(position, tensors))
        else:
            is_position = isinstance(position, int) and not isinstance(position, bool)
            restored.append(tensors[position] if is_position else None)
    return restored


def _double_backward(specification: Callable[..., Any], ctx: Any, douts: list[Tensor | None]) -> tuple[Any, ...]:
    normalize_modulator = ctx.positions[-1]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        arguments = _restore(ctx.positions[:-1], leaves)
        outputs = specification(*arguments, normalize_modulator, ctx.output_mask)
        pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if o is not None and d is not None]
        gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    return (*_restore(ctx.positions[:-1], gradients), None, None, None)


for _name, _specification in (
    ("gated_aggregation_bwd", reference.gated_aggregation_bwd),
    ("focal_modulation_bwd", reference.focal_modulation_bwd),
):
    torch.library.register_autograd(
        f"focalnet::{_name}", functools.partial(_double_backward, _specification), setup_context=_double_setup
    )

"""A block on a GPU, run by operators instead of modules. The end of each residual branch is one pass over memory.

    norms before the branches:   hidden_state, normed = residual_norm(hidden_state, modulation(norm1(...)))
                                 hidden_state = residual(hidden_state, mlp of normed)
    norms after the branches:    hidden_state = residual(hidden_state, branch(hidden_state), norm), twice

In training the operators save less for backward than the modules do (operators/norm_linear.py, norm_mlp.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.registry import optional, requested
from ..functional import focal_modulation
from ..operators import norm_mlp as _norm_mlp  # noqa: F401  (registers the operators)
from ..operators import residual as _residual  # noqa: F401
from ..operators.norm_linear import padded_linear
from .block_parts import BlockParts
from .gate import while_unchanged, why_not_fused
from .module_checks import is_changed, part

OPS = torch.ops.focalnet
Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps
Linear = tuple[Tensor, "Tensor | None"]  # weight, bias
MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


@dataclass(frozen=True)
class _Block:
    """The parts of a block, in the order of `BlockParts.weights_of`, and the settings of a call.

    ``keep`` is the probability that stochastic depth keeps a branch. ``cast`` is the autocast dtype of products, or
    None.
    """

    projection_in: Linear
    focal_weights: list[Tensor]
    projection_context: Linear
    projection_out: Linear
    fc1: Linear
    fc2: Linear
    norm1: Norm
    norm2: Norm
    inner_norm: Norm | None
    gamma_1: Tensor | None
    gamma_2: Tensor | None
    post_norm: bool
    normalize_modulator: bool
    keep: float
    cast: torch.dtype | None
    backend: str | None


def runner(
    block: nn.Module, kind: BlockParts, hidden_state: Tensor, backend: str | None = None
) -> Callable[[Tensor], Tensor] | str:
    """A function that computes ``block``, (B, H, W, C) -> (B, H, W, C), for maps like ``hidden_state``.

    Returns the reason as a string if the modules must run one by one. ``kind`` describes its parts.
    """
    if reason := why_not_fused(hidden_state):
        return reason
    backend = requested(backend)
    kernel = optional("residual", hidden_state, backend)
    if isinstance(kernel, str):
        return kernel
    device_type = hidden_state.device.type
    cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    parts = _parts(block, kind, hidden_state.dtype, hidden_state.device, cast)
    if isinstance(parts, str):
        return parts
    made = _Block(*[*parts, cast, backend])
    # Checked in every call, because `while_unchanged` does not compare shapes.
    if any(gamma is not None and gamma.shape != hidden_state.shape[-1:] for gamma in (made.gamma_1, made.gamma_2)):
        return "a layer scale does not have one value for each channel"
    return functools.partial(_run, made)


@while_unchanged
def _parts(
    block: nn.Module, kind: BlockParts, dtype: torch.dtype, device: torch.device, cast: torch.dtype | None
) -> list[Any] | str:
    """The fields of a `_Block` up to ``keep``, or the reason why the operators cannot run the block."""
    found = kind.weights_of(block)
    if isinstance(found, str):
        return found
    arguments, tensors = found
    in_w, in_b, focal_weights, ctx_w, ctx_b, out_w, out_b, fc1_w, fc1_b, fc2_w, fc2_b, *rest = arguments
    n1w, n1b, eps1, n2w, n2b, eps2, iw, ib, inner_eps, gamma_1, gamma_2, post_norm, normalize = rest
    if cast is not None and dtype != torch.float32:
        return f"autocast is on, and the input is {dtype}, not float32"
    if any(t is not None and (t.dtype != dtype or t.device != device) for t in tensors):
        return "not all parameters have the dtype and the device of the input"
    norms = {"norm1": (n1w, n1b, eps1), "norm2": (n2w, n2b, eps2)}
    if inner_eps is not None:
        norms["layernorm"] = (iw, ib, inner_eps)
    for name, (weight, bias, eps) in norms.items():
        if weight is None or bias is None or not eps:
            return f"{name} has no weight, no bias, or an eps of 0"
    keep = _keep(block, kind)
    if isinstance(keep, str):
        return keep
    linears = [[in_w, in_b], focal_weights, [ctx_w, ctx_b], [out_w, out_b], [fc1_w, fc1_b], [fc2_w, fc2_b]]
    inner_norm = None if inner_eps is None else [iw, ib, inner_eps]
    ends = [[n1w, n1b, eps1], [n2w, n2b, eps2], inner_norm, gamma_1, gamma_2]
    return [*linears, *ends, post_norm, normalize, keep]


def _keep(block: nn.Module, kind: BlockParts) -> float | str:
    """The probability that stochastic depth keeps a branch (1 if it is off), or why other random parts are active."""
    for owner in (block, part(block, "modulation"), part(block, "mlp")):
        for name in kind.names.random:
            child = owner._modules.get(name)
            if type(child) is nn.Dropout and child.training and child.p > 0:
                return f"{name} is in training mode"
    drop_path: Any = block._modules.get("drop_path")
    if drop_path is None or type(drop_path) is nn.Identity or not drop_path.training:
        return 1.0
    if type(drop_path).__name__ != "DropPath" or is_changed(drop_path) or not 0 <= drop_path.drop_prob < 1:
        return "drop_path was replaced, wrapped or hooked, or drops every branch"
    return 1 - drop_path.drop_prob


def draw(hidden_state: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
    """(B, 1, ...) of ``dtype``: 1 for samples of (B, ...) whose branch is kept, with probability ``keep``, else 0."""
    shape = (hidden_state.shape[0],) + (1,) * (hidden_state.ndim - 1)
    return torch.floor(keep + torch.rand(shape, dtype=dtype, device=hidden_state.device))


def _run(block: _Block, hidden_state: Tensor) -> Tensor:
    if block.post_norm:
        update = _modulate(block, _project(block, None, hidden_state))
        hidden_state = _add(block, hidden_state, update, block.gamma_1, block.norm1)
        return _add(block, hidden_state, _mlp(block, hidden_state), block.gamma_2, block.norm2)
    update = _modulate(block, _project(block, block.norm1, hidden_state))
    kept = _kept(block, hidden_state, update, block.gamma_1)
    hidden_state, normed = OPS.residual_norm(
        hidden_state,
        update,
        block.gamma_1,
        kept,
        block.keep,
        *block.norm2,
        block.cast or hidden_state.dtype,
        block.backend,
    )
    return _add(block, hidden_state, _mlp(block, hidden_state, block.norm2, normed), block.gamma_2)


def _project(block: _Block, norm: Norm | None, x: Tensor) -> Tensor:
    """projection_in of ``norm(x)``, or of ``x``. Rows are padded: a backend with residuals has levels too."""
    if not torch.is_grad_enabled():
        return padded_linear(x if norm is None else F.layer_norm(x, x.shape[-1:], *norm), *block.projection_in)
    if block.cast is not None:
        x = x.to(block.cast if norm is None else torch.float32)
    weight, bias = (_cast(block, p) for p in block.projection_in)
    return OPS.norm_linear(x, *(norm or (None, None, None)), weight, bias, block.backend, True)


def _modulate(block: _Block, projected: Tensor) -> Tensor:
    out = _focal_modulation(block, projected)
    if block.inner_norm is not None:
        return _norm_and_linear(block, block.inner_norm, block.projection_out, out)
    return F.linear(out, *block.projection_out)


def _focal_modulation(block: _Block, projected: Tensor) -> Tensor:
    weight, bias = block.projection_context
    normalize = block.normalize_modulator
    if not torch.is_grad_enabled():  # then the function may skip the dispatcher
        channels = weight.shape[0]
        q, ctx, gates = projected.split([channels, channels, len(block.focal_weights) + 1], dim=-1)
        return focal_modulation(
            q, ctx, gates, block.focal_weights, weight, bias, normalize_modulator=normalize, backend=block.backend
        )
    focal_weights = [_cast(block, w) for w in block.focal_weights]
    weight, bias = _cast(block, weight.flatten(1)), _cast(block, bias)
    return OPS.packed_focal_modulation(projected, focal_weights, weight, bias, normalize, block.backend)


def _norm_and_linear(block: _Block, norm: Norm, linear: Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return F.linear(F.layer_norm(x, x.shape[-1:], *norm), *linear)
    weight, bias = linear
    x = x if block.cast is None else x.to(torch.float32)
    return OPS.norm_linear(x, *norm, _cast(block, weight), _cast(block, bias), block.backend)


def _mlp(block: _Block, hidden_state: Tensor, norm: Norm | None = None, normed: Tensor | None = None) -> Tensor:
    """The MLP of ``hidden_state``, or of ``normed`` if given, which is ``norm(hidden_state)``."""
    x = hidden_state if normed is None else normed
    if not torch.is_grad_enabled():
        return F.linear(F.gelu(F.linear(x, *block.fc1)), *block.fc2)
    weights = [_cast(block, p) for p in (*block.fc1, *block.fc2)]
    if norm is None:
        return OPS.norm_mlp(_cast(block, hidden_state), None, None, None, *weights, None, block.backend)[0]
    return OPS.norm_mlp(hidden_state, *norm, *weights, normed, block.backend)[0]


def _cast(block: _Block, tensor: MaybeTensor) -> MaybeTensor:
    return tensor if tensor is None or block.cast is None else tensor.to(block.cast)


def _add(
    block: _Block, hidden_state: Tensor, update: Tensor, gamma: Tensor | None, norm: Norm | None = None
) -> Tensor:
    """The end of a residual branch: norm, layer scale, stochastic depth, sum."""
    kept = _kept(block, hidden_state, update, hidden_state if norm is not None else gamma)
    if gamma is None and kept is None and norm is None:
        return hidden_state + update
    return OPS.residual(hidden_state, update, gamma, kept, block.keep, *(norm or (None, None, 0.0)), block.backend)


def _kept(block: _Block, hidden_state: Tensor, update: Tensor, factor: Tensor | None) -> Tensor | None:
    """The samples to keep, drawn in the dtype of ``factor * update``, or None if stochastic depth is off."""
    if block.keep == 1:
        return None
    dtype = update.dtype if factor is None else torch.promote_types(update.dtype, factor.dtype)
    return draw(hidden_state, block.keep, dtype)

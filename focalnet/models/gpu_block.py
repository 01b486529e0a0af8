"""A block on a GPU, with the ends of its residual branches as one pass each over memory.

    before the branches (norm1, norm2):   hidden_state, normed = residual_norm(hidden_state, modulation(norm1(...)))
                                          hidden_state = residual(hidden_state, mlp of normed)
    behind them:                          hidden_state = residual(hidden_state, branch(hidden_state), norm), twice

`runner` gives what computes such a block, or says why its modules have to run one by one. The branches themselves are
called as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends.problem import Problem
from ..backends.registry import optional, requested
from ..fusion.module_checks import is_changed, is_plain
from ..fusion.observers import why_not_fused
from ..operators import residual as _residual  # noqa: F401  (registers the operators)
from ..operators import residual_norm as _residual_norm  # noqa: F401
from .mlp import DropPath, FocalNetMlp


def runner(block: nn.Module, hidden_state: Tensor, backend: str | None = None) -> Callable[[Tensor], Tensor] | str:
    """What computes ``block`` of ``hidden_state`` (B, H, W, C), or why its modules have to run one by one."""
    if reason := why_not_fused(hidden_state):
        return reason
    backend = requested(backend)
    kernel = optional(Problem.of_rows("residual", hidden_state), backend)
    if isinstance(kernel, str):
        return kernel
    reason = _why_not_parts(block, hidden_state)
    return reason or functools.partial(_run, block, backend)


def _why_not_parts(block: nn.Module, hidden_state: Tensor) -> str | None:
    channels = hidden_state.shape[-1:]
    norms = {"norm2": block.norm2}
    if block.use_post_layernorm:
        norms["norm1"] = block.norm1
    for name, norm in norms.items():
        if not is_plain(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != tuple(channels):
            return f"{name} was replaced, wrapped or hooked"
        if norm.weight is None or norm.bias is None or not norm.eps:
            return f"{name} has no weight, no bias, or an eps of 0"
    drop_path = block.drop_path
    if type(drop_path) not in (DropPath, nn.Identity) or is_changed(drop_path):
        return "drop_path was replaced, wrapped or hooked"
    if type(drop_path) is DropPath and not drop_path.keep_prob > 0:
        return "drop_path leaves every branch out"
    scales = [gamma for gamma in (block.gamma_1, block.gamma_2) if gamma is not None]
    if any(type(gamma) not in (Tensor, nn.Parameter) or gamma.shape != channels for gamma in scales):
        return "gamma_1 or gamma_2 is not a plain tensor with a value for each channel"
    parameters = [*scales, *(p for norm in norms.values() for p in (norm.weight, norm.bias))]
    if any(p.device != hidden_state.device or p.dtype != hidden_state.dtype for p in parameters):
        return "norms and scales are not of the dtype, or not on the device, of the input"
    if _autocast_dtype(hidden_state) is not None and hidden_state.dtype != torch.float32:
        return f"autocast is on, and the input is {hidden_state.dtype}, not float32"
    return None


def _autocast_dtype(hidden_state: Tensor) -> torch.dtype | None:
    """What autocast casts products to, None where it is off."""
    device_type = hidden_state.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _run(block: nn.Module, backend: str | None, hidden_state: Tensor) -> Tensor:
    if block.use_post_layernorm:
        hidden_state = _add(block, backend, hidden_state, block.modulation(hidden_state), block.gamma_1, block.norm1)
        return _add(block, backend, hidden_state, block.mlp(hidden_state), block.gamma_2, block.norm2)
    update = block.branch_of_normed(block.modulation, block.norm1, hidden_state)
    hidden_state, update = _add_and_norm_for_mlp(block, backend, hidden_state, update)
    return _add(block, backend, hidden_state, update, block.gamma_2)


def _add(
    block: nn.Module,
    backend: str | None,
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """The branch's end: norm, layer scale, stochastic depth, sum."""
    if not _is_update(update, hidden_state):
        return block.add(hidden_state, update if norm is None else norm(update), gamma)
    kept = _draw(block, hidden_state, update, hidden_state if norm is not None else gamma)
    if gamma is None and kept is None and norm is None:
        return hidden_state + update
    affine = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return torch.ops.focalnet.residual(hidden_state, update, gamma, kept, _keep(block), *affine, backend)


def _add_and_norm_for_mlp(
    block: nn.Module, backend: str | None, hidden_state: Tensor, update: Tensor
) -> tuple[Tensor, Tensor]:
    """The first branch's end, and the second branch: its norm is made by the pass that ends the first."""
    norm, mlp = block.norm2, block.mlp
    if not _is_update(update, hidden_state):
        hidden_state = block.add(hidden_state, update, block.gamma_1)
        return hidden_state, block.branch_of_normed(mlp, norm, hidden_state)
    kept = _draw(block, hidden_state, update, block.gamma_1)
    is_ours = type(mlp) is FocalNetMlp and not is_changed(mlp) and is_plain(mlp.fc1, nn.Linear)
    # fc1 would cast to autocast's dtype first of all; whatever else is called sees the norm's own.
    norm_dtype = (_autocast_dtype(hidden_state) if is_ours else None) or hidden_state.dtype
    affine = (norm.weight, norm.bias, norm.eps)
    hidden_state, normed = torch.ops.focalnet.residual_norm(
        hidden_state, update, block.gamma_1, kept, _keep(block), *affine, norm_dtype, backend
    )
    if not is_ours:
        return hidden_state, mlp(normed)
    return hidden_state, mlp.of_normed(norm, hidden_state, normed, backend=backend)


def _is_update(update: Tensor, hidden_state: Tensor) -> bool:
    """Whether what a branch returned is what the kernels add: a plain tensor alike, or in autocast's dtype."""
    if type(update) is not Tensor or update.shape != hidden_state.shape or update.device != hidden_state.device:
        return False
    return update.dtype in (hidden_state.dtype, _autocast_dtype(hidden_state))


def _keep(block: nn.Module) -> float:
    return block.drop_path.keep_prob if type(block.drop_path) is DropPath else 1.0


def _draw(block: nn.Module, hidden_state: Tensor, update: Tensor, factor: Tensor | None) -> Tensor | None:
    """The samples to keep, drawn in the dtype that the update has once ``factor`` is in it."""
    if type(block.drop_path) is not DropPath:
        return None
    dtype = update.dtype if factor is None else torch.promote_types(update.dtype, factor.dtype)
    return block.drop_path.draw(hidden_state, dtype)

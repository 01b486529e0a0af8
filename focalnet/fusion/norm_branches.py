"""A linear layer or an MLP after a LayerNorm: one operator in training, else the modules one by one.

The operators (operators/norm_linear.py, norm_mlp.py) save less for backward than the modules do, and call no module.
They are used only for plain modules. If a module has something that acts when it is called (hooks, adapters,
offloading, sharding), the modules are called.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..backends.registry import pads, requested
from ..operators import norm_mlp as _norm_mlp  # noqa: F401  (registers the operators)
from ..operators.autocast import autocast_dtype
from ..operators.exporting import is_exporting
from ..operators.norm_linear import padded_linear
from .gate import why_not_fused
from .module_checks import is_changed, is_exact_gelu, is_plain, is_proxy


def norm_linear(
    norm: nn.Module, layer: nn.Module, hidden_state: Tensor, backend: str | None = None, padded: bool = False
) -> Tensor:
    """``layer(norm(hidden_state))``, (..., K) -> (..., N). The output of ``norm`` is not saved for backward.

    ``padded`` is the answer of `may_pad`.
    """
    operands = None
    if _is_norm(norm, hidden_state) and is_plain(layer, nn.Linear):
        operands = _operands(norm, (layer,), hidden_state, backend)
    if operands is None:
        return linear(layer, norm(hidden_state), backend, padded) if padded else layer(norm(hidden_state))
    hidden_state, norm_weight, norm_bias, weights = operands
    return torch.ops.focalnet.norm_linear(hidden_state, norm_weight, norm_bias, norm.eps, *weights, backend, padded)


def linear(layer: nn.Module, hidden_state: Tensor, backend: str | None = None, padded: bool = False) -> Tensor:
    """``layer(hidden_state)``, (..., K) -> (..., N), by an operator if the device has a product of its own for it.

    ``padded`` is the answer of `may_pad`.
    """
    if padded:
        return _padded(layer, hidden_state, backend)
    operands = None
    if not is_proxy(hidden_state) and hidden_state.device.type == "cpu" and is_plain(layer, nn.Linear):
        operands = _operands(None, (layer,), hidden_state, backend)
    if operands is None:
        return layer(hidden_state)
    hidden_state, _, _, weights = operands
    return torch.ops.focalnet.norm_linear(hidden_state, None, None, None, *weights, backend)


def may_pad(layer: nn.Module, hidden_state: Tensor, backend: str | None = None) -> bool:
    """Whether rows of ``layer(hidden_state)`` should begin at multiples of 16 elements, and ``layer`` allows it.

    That is where a backend that reads 16 bytes at a time may run focal modulation, and nothing but a compiler observes
    the call.
    """
    if is_proxy(hidden_state) or hidden_state.dtype == torch.float64:
        return False
    dtype = autocast_dtype(hidden_state.device.type)
    if not pads(hidden_state.device, dtype or hidden_state.dtype, backend) or not is_plain(layer, nn.Linear):
        return False
    if torch.compiler.is_compiling():
        if is_exporting() or type(hidden_state) not in (Tensor, nn.Parameter):
            return False
    elif why_not_fused(hidden_state) is not None:
        return False
    given = hidden_state.dtype if dtype is None else torch.float32
    parameters = [p for p in _weight_and_bias(layer) if p is not None]
    return all(p.dtype == given and p.device == hidden_state.device for p in parameters)


def _padded(layer: Any, hidden_state: Tensor, backend: str | None) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if not torch.is_grad_enabled():
        return padded_linear(hidden_state, weight, bias)
    if (dtype := autocast_dtype(hidden_state.device.type)) is not None:
        hidden_state, weight, bias = hidden_state.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.focalnet.norm_linear(hidden_state, None, None, None, weight, bias, backend, True)


def norm_mlp(
    norm: nn.Module | None,
    mlp: nn.Module,
    hidden_state: Tensor,
    normed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """``mlp.fc2(GELU(mlp.fc1(norm(hidden_state))))``, (..., C) -> (..., C), or None if ``mlp`` must be called itself.

    Only the input and fc1's output are saved for backward. ``norm`` may be None. ``normed`` is ``norm(hidden_state)``
    if the caller has computed it already.
    """
    if norm is not None and not _is_norm(norm, hidden_state):
        return None
    parts: Any = mlp
    if not (is_plain(parts.fc1, nn.Linear) and is_plain(parts.fc2, nn.Linear)) or is_changed(parts.activation):
        return None
    if not is_exact_gelu(parts.activation) or type(parts.drop) is not nn.Dropout or is_changed(parts.drop):
        return None
    operands = None
    if parts.drop.p == 0.0 or not parts.drop.training:
        operands = _operands(norm, (parts.fc1, parts.fc2), hidden_state, backend)
    if operands is None:
        return None
    hidden_state, norm_weight, norm_bias, weights = operands
    eps = None if norm is None else norm.eps
    if normed is not None and weights[0] is not None:
        normed = normed.to(weights[0].dtype)
    return torch.ops.focalnet.norm_mlp(hidden_state, norm_weight, norm_bias, eps, *weights, normed, backend)[0]


def _is_norm(norm: nn.Module, hidden_state: Tensor) -> TypeGuard[nn.LayerNorm]:
    if is_proxy(hidden_state):
        return False
    return is_plain(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == (hidden_state.shape[-1],)


def _operands(
    norm: nn.Module | None, linears: tuple[nn.Module, ...], hidden_state: Tensor, backend: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]] | None:
    """(hidden_state, norm weight, norm bias, [weight, bias of every linear]), or None if the modules must be called.

    Under autocast the norm runs in float32 and the products in autocast's dtype, as with separate modules.
    """
    modules = linears if norm is None else (norm, *linears)
    if _must_stay_visible(hidden_state, backend) or not (torch.is_grad_enabled() or any(m.training for m in modules)):
        return None
    norm_weight, norm_bias = (None, None) if norm is None else _weight_and_bias(norm)
    weights = [parameter for linear in linears for parameter in _weight_and_bias(linear)]
    parameters = [p for p in (norm_weight, norm_bias, *weights) if p is not None]
    if any(p.device.type != hidden_state.device.type for p in parameters):
        return None
    if (dtype := autocast_dtype(hidden_state.device.type)) is not None:
        if any(p.dtype != torch.float32 for p in parameters) or hidden_state.dtype == torch.float64:
            return None
        hidden_state = hidden_state.to(dtype if norm is None else torch.float32)
        return hidden_state, norm_weight, norm_bias, [None if w is None else w.to(dtype) for w in weights]
    if any(p.dtype != hidden_state.dtype for p in parameters):
        return None
    return hidden_state, norm_weight, norm_bias, weights


def _weight_and_bias(module: Any) -> tuple[Tensor | None, Tensor | None]:
    return module.weight, module.bias


def _must_stay_visible(hidden_state: Tensor, backend: str | None) -> bool:
    """Whether the modules must run as separate steps: the reference was requested, or something observes the call."""
    if requested(backend) == "reference":
        return True
    if torch.compiler.is_compiling() and type(hidden_state) in (Tensor, nn.Parameter):
        # A compiler for GPUs fuses the steps on its own and recomputes cheap ones.
        return is_exporting() or hidden_state.device.type != "cpu"
    return why_not_fused(hidden_state) is not None

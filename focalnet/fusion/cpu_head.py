"""What follows the last stage in inference on a CPU: LayerNorm with the mean of the tokens, and a linear layer.

PyTorch's operators are as fast. Their threads spin after a call, though, and slow down the next forward, whose
operators have threads of their own (csrc/cpu/threads.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..backends.registry import requested
from .cpu_inference import Precision, kernel, why_not_call, why_not_weights
from .gate import while_unchanged
from .module_checks import is_changed, is_mean


def norm_mean(
    norm: nn.Module, pooler: nn.Module | None, hidden_state: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | str:
    """A function (B, H, W, C) -> normed tokens (B, H * W, C) and their mean (B, C).

    Returns the reason as a string if the modules must be called.
    """
    if reason := why_not_call(hidden_state):
        return reason
    if pooler is None or not is_mean(pooler):
        return "there is no pooling to the mean, or it was wrapped or hooked"
    found = _norm_call(norm, Precision.of(hidden_state), requested(None))
    if isinstance(found, str):
        return found
    operator, arguments = found
    return lambda x: operator(x, *arguments)


def linear(layer: nn.Module, features: Tensor) -> Callable[[Tensor], Tensor] | str:
    """A function that computes ``layer``, (B, K) -> (B, N), or the reason why the module must be called."""
    if reason := why_not_call(features):
        return reason
    found = _linear_call(layer, Precision.of(features), requested(None))
    if isinstance(found, str):
        return found
    operator, arguments = found
    return lambda x: operator(x, *arguments)


@while_unchanged
def _norm_call(norm: nn.Module, precision: Precision, backend: str | None) -> list[Any] | str:
    if type(norm) is not nn.LayerNorm or is_changed(norm) or len(norm.normalized_shape) != 1:
        return f"the norm is {type(norm).__name__}, or was wrapped or hooked; expected a plain LayerNorm"
    return _with_parameters("norm_mean", norm, precision, backend, norm.eps)


@while_unchanged
def _linear_call(layer: nn.Module, precision: Precision, backend: str | None) -> list[Any] | str:
    if type(layer) is not nn.Linear or is_changed(layer):
        return f"the layer is {type(layer).__name__}, or was wrapped or hooked; expected a plain Linear"
    return _with_parameters("linear", layer, precision, backend, precision.rounded)


def _with_parameters(
    operator: str, module: nn.Module, precision: Precision, backend: str | None, *settings: float
) -> list[Any] | str:
    """[the function that runs ``operator``, [weight, bias, *settings]], or the reason why it cannot run."""
    run = kernel(operator, precision.dtype, backend)
    if isinstance(run, str):
        return run
    if not {"weight", "bias"} <= module._parameters.keys():
        return "a weight is computed"
    affine = [module._parameters["weight"], module._parameters["bias"]]
    return why_not_weights(affine, precision, module) or [run, [*affine, *settings]]

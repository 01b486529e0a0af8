"""What follows the last stage in inference on a CPU: LayerNorm with the mean of the tokens, and a linear layer.

PyTorch's operators are as fast. Their threads spin after a call, though, and slow down the next forward, whose
operators have threads of their own (csrc/cpu/threads.h).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .cpu_inference import Precision, kernel, why_not_weights
from .gate import while_unchanged
from .module_checks import is_changed, is_mean


def run(x: Tensor, call: tuple[Any, ...]) -> Any:
    """The result of a ``call`` that `norm_mean` or `linear` found."""
    operator, arguments = call
    return operator(x, *arguments)


def norm_mean(norm: nn.Module, pooler: nn.Module | None, precision: Precision, backend: str | None) -> list[Any] | str:
    """The call (B, H, W, C) -> normed tokens (B, N, C) and their mean (B, C), or why the modules must be called."""
    if pooler is None or not is_mean(pooler):
        return "there is no pooling to the mean, or it was wrapped or hooked"
    if type(norm) is not nn.LayerNorm or is_changed(norm) or len(norm.normalized_shape) != 1:
        return f"the norm is {type(norm).__name__}, or was wrapped or hooked; expected a plain LayerNorm"
    return _with_parameters("norm_mean", norm, precision, backend, norm.eps)


@while_unchanged
def linear(layer: nn.Module, precision: Precision, backend: str | None) -> list[Any] | str:
    """The call (B, K) -> (B, N) that computes ``layer``, or the reason why the module must be called."""
    if type(layer) is not nn.Linear or is_changed(layer):
        return f"the layer is {type(layer).__name__}, or was wrapped or hooked; expected a plain Linear"
    return _with_parameters("linear", layer, precision, backend, precision.rounded)


def _with_parameters(
    operator: str, module: nn.Module, precision: Precision, backend: str | None, *settings: float
) -> list[Any] | str:
    """[the function that runs ``operator``, [weight, bias, *settings]], or the reason why it cannot run."""
    function = kernel(operator, precision.dtype, backend)
    if isinstance(function, str):
        return function
    if not {"weight", "bias"} <= module._parameters.keys():
        return "a weight is computed"
    affine = [module._parameters["weight"], module._parameters["bias"]]
    return why_not_weights(affine, precision, module) or [function, [*affine, *settings]]

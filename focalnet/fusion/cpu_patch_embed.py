"""Patch embeddings in inference on a CPU: a strided convolution and its LayerNorm as one operator, which computes a
matrix product on channels-last tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .cpu_inference import Precision, kernel, why_not_weights
from .module_checks import is_changed


def call(
    conv: nn.Module | None,
    norm: nn.Module | None,
    precision: Precision,
    backend: str | None,
    *,
    own_threads: bool = False,
) -> list[Any] | str:
    """The call for `run` that replaces ``conv`` and ``norm``, or the reason why these modules must be called.

    ``own_threads`` is explained at `cpu_block.call`.
    """
    operator = kernel("patch_embed", precision.dtype, backend)
    if isinstance(operator, str):
        return operator
    if conv is None or norm is None:
        return "there is no projection, or no norm"
    if reason := _unusual_part(conv, norm):
        return reason
    affine = (norm._parameters["weight"], norm._parameters["bias"])
    projection = (conv._parameters["weight"], conv._parameters["bias"])
    reason = why_not_weights((*projection, *affine), precision, conv, norm)
    before_size = [*projection, conv.stride, conv.padding]
    return reason or [operator, before_size, [*affine, norm.eps, own_threads, precision.rounded]]


def run(x: Tensor, size: tuple[int, int], call: list[Any]) -> Tensor:
    """``norm(conv(x))``, (B, H, W, C) -> (B, *size, N), by the operator and arguments that `call` returned."""
    operator, before_size, behind_size = call
    return operator(x, *before_size, size, *behind_size)


def _unusual_part(conv: nn.Module, norm: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d or is_changed(conv) or not {"weight", "bias"} <= conv._parameters.keys():
        return f"the projection is {type(conv).__name__}, or was wrapped or hooked; expected a plain Conv2d"
    if type(norm) is not nn.LayerNorm or is_changed(norm) or not {"weight", "bias"} <= norm._parameters.keys():
        return f"the norm is {type(norm).__name__}, or was wrapped or hooked; expected a plain LayerNorm"
    if norm.normalized_shape != (conv.out_channels,):
        return f"the norm is over {norm.normalized_shape}; expected the {conv.out_channels} channels"
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "the convolution is grouped, dilated, or not padded with a fixed number of zeros"
    return None

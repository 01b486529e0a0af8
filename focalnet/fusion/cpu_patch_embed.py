"""Patches to channels in inference on a CPU: a strided convolution and its LayerNorm as one operator, a matrix product
on channels-last tokens.

`weights` gives what the operator takes of the modules, or says why these have to be called; `run` calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cpu_inference import reason_against_weights
from .module_checks import is_changed


def weights(conv: nn.Module, norm: nn.Module) -> tuple | str:
    """What the operator takes of ``conv`` and ``norm``; the reason instead, where these have to be called."""
    if reason := _unusual_part(conv, norm):
        return reason
    affine = (norm._parameters["weight"], norm._parameters["bias"])
    projection = (conv._parameters["weight"], conv._parameters["bias"])
    reason = reason_against_weights((*projection, *affine), conv, norm)
    return reason or (*projection, conv.stride, conv.padding, *affine, norm.eps)


def run(x: Tensor, size: tuple[int, int], arguments: tuple) -> Tensor:
    """``norm(conv(x))``, (B, H, W, C) -> (B, *size, N), of the `weights`."""
    return torch.ops.focalnet.cpu_patch_embed(x, *arguments[:4], size, *arguments[4:])


def _unusual_part(conv: nn.Module, norm: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d or is_changed(conv) or not {"weight", "bias"} <= conv._parameters.keys():
        return f"the projection is {type(conv).__name__}, or was wrapped or hooked; expected a plain Conv2d"
    if type(norm) is not nn.LayerNorm or is_changed(norm) or not {"weight", "bias"} <= norm._parameters.keys():
        return f"the norm is {type(norm).__name__}, or was wrapped or hooked; expected a plain LayerNorm"
    if norm.normalized_shape != (conv.out_channels,):
        return f"the norm is over {norm.normalized_shape}; expected the {conv.out_channels} channels"
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "the convolution is grouped, dilated, or padded with something else than a number of zeros"
    return None

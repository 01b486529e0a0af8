"""Checks that the modules that gather context are what the operators expect.

The operators read weights and call no module. Without these checks they would ignore everything that acts when a
module is called (hooks, adapters, offloading, another activation), the settings of a convolution, and parameters that
represent other data (quantised, sharded, sparse).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.problem import is_plain_tensor
from .module_checks import is_changed, is_exact_gelu, part


def unusual_context(modulation: nn.Module, projection_context: str, activation: str) -> str | None:
    """The name of the first part of ``modulation`` between its projections that must be called, or None.

    The parts are ``focal_layers`` and those named by ``projection_context`` and ``activation``. The activation is
    optional. None means that an operator may replace all calls.
    """
    focal_layers = part(modulation, "focal_layers")
    if (name := unusual_level(focal_layers)) is not None:
        return name
    for index, convolution in enumerate(convolutions(focal_layers)):
        if not _is_readable(parameter(convolution, "weight")):
            return f"focal_layers.{index}.0"
    context = part(modulation, projection_context)
    if type(context) is not nn.Conv2d or not is_pointwise(context) or is_changed(context):
        return projection_context
    bias = parameter(context, "bias")
    if not _is_readable(parameter(context, "weight")) or not (bias is None or _is_readable(bias)):
        return projection_context
    gelu = modulation._modules.get(activation)
    if gelu is not None and (not is_exact_gelu(gelu) or is_changed(gelu)):
        return activation
    return None


def unusual_level(focal_layers: nn.Module) -> str | None:
    """The name of the first level or part that is not a depthwise convolution with an exact GELU, or None."""
    for index, level in focal_layers._modules.items():
        if type(level) is not nn.Sequential or is_changed(level) or len(level._modules) != 2:
            return f"focal_layers.{index}"
        convolution, activation = level._modules.values()
        if not is_depthwise(convolution) or is_changed(convolution):
            return f"focal_layers.{index}.0"
        if not is_exact_gelu(activation) or is_changed(activation):
            return f"focal_layers.{index}.1"
    return None


def convolutions(focal_layers: nn.Module) -> list[nn.Module]:
    """Those of the levels, each of which is known to be a Sequential."""
    levels: Iterable[Any] = focal_layers._modules.values()
    return [level._modules["0"] for level in levels]


def is_depthwise(module: nn.Module) -> bool:
    """Whether ``module`` is a depthwise convolution without bias that keeps the map's size."""
    if type(module) is not nn.Conv2d or parameter(module, "bias") is not None:
        return False
    height, width = module.kernel_size
    return (
        height % 2 == width % 2 == 1
        and module.groups == module.in_channels == module.out_channels
        and module.padding in ((height // 2, width // 2), "same")
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
    )


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` is a matrix product at every position."""
    is_matrix = conv.kernel_size == (1, 1) and conv.groups == 1
    return is_matrix and conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")


def widest_kernel(focal_layers: nn.Module) -> int:
    """The width of the widest convolution anywhere in ``focal_layers``, or 1 if there is none."""
    return max((conv.kernel_size[1] for conv in focal_layers.modules() if isinstance(conv, nn.Conv2d)), default=1)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of ``module``, or the plain tensor that replicas of DataParallel have instead."""
    # Under torch.fx, getattr would return a proxy for a parameter.
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def weight_of(module: nn.Module) -> Tensor:
    """The weight that ``module`` computes with and is known to have."""
    weight: Any = parameter(module, "weight")
    return weight


def _is_readable(tensor: Tensor | None) -> bool:
    if is_plain_tensor(tensor):
        return True
    # Exporters replace parameters by their own tensors.
    return isinstance(tensor, Tensor) and _is_fake(tensor) and tensor.layout is torch.strided


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torch._subclasses")

"""The focal modulation of each published code base: whether a module is one, and the forward that replaces its own.

A module is recognised by its structure, never by the package it was imported from. Names and shapes decide whether it
is a candidate. A trial (see `probe`) then decides whether it computes focal modulation, because some modules have the
same parts and compute something else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..backends.registry import requested
from ..functional import focal_modulation, gated_aggregation, packed_focal_modulation
from ..fusion.context_parts import convolutions, parameter, unusual_context, weight_of, widest_kernel
from ..fusion.module_checks import is_exact_gelu, part
from ..fusion.norm_branches import linear, may_pad
from ..fusion.part_names import MODULATION
from ..onednn import guarded

# torch.fx cannot trace through these functions, so each becomes one node of the graph.
torch.fx.wrap("focal_modulation")
torch.fx.wrap("gated_aggregation")


KEPT = ("gates", "modulator")  # attributes that the authors' modules set for visualisation


def is_candidate(module: nn.Module) -> bool:
    """Whether ``module`` may be a focal modulation, that is, has ``focal_layers``."""
    return "focal_layers" in module._modules


def source_of(module: nn.Module) -> str | None:
    """The code base whose names for the parts occur in ``module``, or None."""
    children = module._modules.keys()
    for source, names in MODULATION.items():
        is_convolution = isinstance(module._modules.get(names.projection_in), nn.Conv2d)
        if names.required <= children and names.channels_first == is_convolution:
            return source
    return None


def why_not(module: nn.Module, source: str) -> str | None:
    """Why the parts of ``module``, named as in ``source``, are not those of a focal modulation; None if they are."""
    names = MODULATION[source]
    if unknown := sorted((module._modules.keys() - names.known) | module._parameters.keys() | module._buffers.keys()):
        return f"it also has {', '.join(unknown)}, which a focal modulation does not have"
    if (reason := _why_not_levels(part(module, "focal_layers"))) is not None:
        return reason
    context = module._modules[names.projection_context]
    if not isinstance(context, nn.Conv2d) or context.kernel_size != (1, 1) or context.groups != 1:
        return f"{names.projection_context} is {context}, not a 1x1 convolution"
    activation = module._modules.get(names.activation)
    if activation is not None and not is_exact_gelu(activation):
        return f"{names.activation} is {activation}, not the exact GELU"
    return None


def _why_not_levels(focal_layers: nn.Module) -> str | None:
    if not isinstance(focal_layers, nn.ModuleList) or len(focal_layers) == 0:
        return f"focal_layers is {type(focal_layers).__name__} of {len(list(focal_layers.children()))} levels"
    for index, level in enumerate(focal_layers):
        name = f"focal_layers.{index}"
        if not isinstance(level, nn.Sequential) or len(level) != 2:
            return (
                f"{name} is not a convolution and a GELU but a {type(level).__name__} of {len(list(level.children()))}"
            )
        conv, activation = level
        if not isinstance(conv, nn.Conv2d) or conv.bias is not None or conv.groups != conv.in_channels:
            return f"{name}.0 is {conv}, not a depthwise convolution without bias"
        height, width = conv.kernel_size
        if height != width:
            return f"{name}.0 has a rectangular kernel, {height} x {width}"
        if height % 2 == 0 or conv.padding not in ((height // 2, height // 2), "same"):
            return (
                f"{name}.0 has a kernel of {height} and a padding of {conv.padding}: it does not keep the map's size"
            )
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            return f"{name}.0 is {conv}, with an unsupported stride, dilation or padding mode"
        if not is_exact_gelu(activation):
            return f"{name}.1 is {activation}, not the exact GELU"
    return None


def forward(
    module: nn.Module, x: Tensor, *, source: str, backend: str | None = None, keep_modulator: bool = False
) -> Tensor:
    """The ``forward`` of a patched focal modulation. Shapes are those of the module's own forward.

    RuntimeError if a backend was requested by name and a part of the module was replaced, wrapped or hooked.
    """
    names = MODULATION[source]
    context = part(module, names.projection_context)
    # The operator reads weights and calls no module, so replaced or hooked modules need their own forward.
    changed = unusual_context(module, names.projection_context, names.activation)
    if changed is not None:
        return _own_forward(module, x, backend, changed)
    projection_in = part(module, names.projection_in)
    padded = may_pad(projection_in, x, backend)
    projected = linear(projection_in, x, backend, padded) if padded else projection_in(x)
    if names.channels_first:
        projected = projected.permute(0, 2, 3, 1)
    focal_weights = [weight_of(convolution) for convolution in convolutions(part(module, "focal_layers"))]
    channels: Any = context.in_channels
    q, ctx, gates = projected.split([channels, channels, len(focal_weights) + 1], dim=-1)
    normalize = any(getattr(module, name, False) for name in names.normalize)
    if keep_modulator:
        agg = gated_aggregation(ctx, gates, focal_weights, normalize_modulator=normalize, backend=backend)
        module.gates = gates.permute(0, 3, 1, 2)
        module.modulator = modulator = context(agg.permute(0, 3, 1, 2))
        out = q * modulator.permute(0, 2, 3, 1)
    else:
        settings: Any = {"normalize_modulator": normalize, "backend": backend}
        weights = (focal_weights, weight_of(context), parameter(context, "bias"))
        if padded and torch.is_grad_enabled():
            out = packed_focal_modulation(projected, *weights, **settings)
        else:
            out = focal_modulation(q, ctx, gates, *weights, **settings)
    if names.channels_first:
        out = out.permute(0, 3, 1, 2)
    for name in (names.layernorm, names.projection_out, names.projection_dropout):
        module_behind = module._modules.get(name)
        out = out if module_behind is None else module_behind(out)
    return out


def _own_forward(module: nn.Module, x: Tensor, backend: str | None, changed: str) -> Tensor:
    if requested(backend) not in (None, "reference"):
        raise RuntimeError(
            f"backend {requested(backend)!r} cannot run this {type(module).__name__}: {changed} was replaced, wrapped "
            f"or hooked, so the module's own forward must run. Omit the backend or undo the change."
        )
    with guarded(x, widest_kernel(part(module, "focal_layers"))):
        return type(module).forward(module, x)

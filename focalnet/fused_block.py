"""The block in inference on a CPU: one operator instead of some twenty, with its weights packed once.

`reason_against` says whether a call can go there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .mlp import DropPath, FocalNetMlp
from .modules import FocalModulation
from .packing import arguments_of, packed_of, reason_against_call
from .plain import is_changed

if TYPE_CHECKING:
    from .layers import FocalNetLayer

# What the operator stands for: the parts of a block, by name.
_PARTS = (
    (r"norm[12]|modulation\.layernorm", (nn.LayerNorm,)),
    (r"modulation\.projection_(in|out)|mlp\.fc[12]", (nn.Linear,)),
    (r"modulation\.(projection_context|focal_layers\.\d+\.0)", (nn.Conv2d,)),
    (r"modulation\.focal_layers\.\d+\.1|mlp\.activation", (nn.GELU, GELUActivation)),
    (r"modulation\.focal_layers\.\d+", (nn.Sequential,)),
    (r"modulation\.focal_layers", (nn.ModuleList,)),
    (r"modulation\.projection_dropout|mlp\.drop", (nn.Dropout,)),
    (r"drop_path", (nn.Identity, DropPath)),
    (r"modulation", (FocalModulation,)),
    (r"mlp", (FocalNetMlp,)),
)


def reason_against(layer: FocalNetLayer, hidden_state: Tensor) -> str | None:
    """Why the fused operator cannot take this call, or None if it can."""
    if layer.training or layer.mlp.drop.training or layer.drop_path.training:
        return "the block is in training mode"
    if reason := reason_against_call(hidden_state, layer.modulation.backend):
        return reason
    return packed_of(layer, _settings(layer), lambda: _unusual_part(layer), lambda: _pack(layer)).reason


def run(layer: FocalNetLayer, hidden_state: Tensor) -> Tensor:
    """``layer(hidden_state)``, (B, H, W, C) -> (B, H, W, C), where `reason_against` has none."""
    return torch.ops.focalnet.cpu_block(hidden_state, *arguments_of(layer))


def _settings(layer: FocalNetLayer) -> tuple:
    """What is neither module nor parameter, and yet decides what the block computes."""
    modulation = layer.modulation
    norms = (layer.norm1, layer.norm2, getattr(modulation, "layernorm", None))
    return (
        layer.use_post_layernorm,
        torch.ops.focalnet.cpu_isa(),  # focal weights are packed for its vectors
        getattr(modulation, "use_post_layernorm_in_modulation", None),
        getattr(modulation, "normalize_modulator", None),
        *(getattr(norm, "eps", None) for norm in norms),
    )


def _unusual_part(layer: FocalNetLayer) -> str | None:
    for name, module in list(layer.named_modules())[1:]:
        kinds = next((kinds for pattern, kinds in _PARTS if re.fullmatch(pattern, name)), ())
        if type(module) not in kinds or is_changed(module):
            return f"{name} is {type(module).__name__}, or was wrapped or hooked; expected a plain part of a block"
    activation = layer.mlp.activation
    if getattr(activation, "act", None) is not F.gelu and getattr(activation, "approximate", None) != "none":
        return "the MLP's activation is not the exact GELU"
    return None


def _pack(layer: FocalNetLayer) -> tuple:
    """The arguments of the operator after ``hidden_state``.

    The affine part of a LayerNorm that stands before a linear layer is folded into it, and so is a layer scale that
    stands behind one; behind the branch, norm and layer scale become one affine norm.
    """
    modulation: FocalModulation = layer.modulation
    post_norm = layer.use_post_layernorm

    def pack(linear: nn.Module, norm: nn.LayerNorm | None = None, gamma: Tensor | None = None) -> Tensor:
        scale, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        return torch.ops.focalnet.cpu_pack_linear(linear.weight.flatten(1), linear.bias, scale, shift, gamma)

    def affine(norm: nn.LayerNorm, gamma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if not post_norm:
            return None, None
        return (norm.weight, norm.bias) if gamma is None else (gamma * norm.weight, gamma * norm.bias)

    before = (None, None) if post_norm else (layer.norm1, layer.norm2)
    behind = (None, None) if post_norm else (layer.gamma_1, layer.gamma_2)
    focal_weights = [level[0].weight for level in modulation.focal_layers]
    inner = modulation.layernorm if modulation.use_post_layernorm_in_modulation else None
    return (
        pack(modulation.projection_in, before[0]),
        torch.ops.focalnet.cpu_pack_focal(focal_weights),
        [size for weight in focal_weights for size in weight.shape[2:]],
        pack(modulation.projection_context),
        pack(modulation.projection_out, inner, behind[0]),
        pack(layer.mlp.fc1, before[1]),
        pack(layer.mlp.fc2, None, behind[1]),
        *affine(layer.norm1, layer.gamma_1),
        *affine(layer.norm2, layer.gamma_2),
        layer.norm1.eps,
        layer.norm2.eps,
        None if inner is None else inner.eps,
        modulation.normalize_modulator,
    )

"""The block in inference on a CPU: one operator instead of some twenty, with its weights packed once.

`reason_against` says whether a call can go there. What is packed is kept as long as the block lives, and packed again
when a parameter was replaced, moved or changed in place. Writing to a parameter through ``.data`` is the one change
that PyTorch does not count: call ``model.train()`` (as every training loop does) or `forget` after it.
"""

from __future__ import annotations

import operator
import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from . import extension
from .backends import requested
from .mlp import DropPath, FocalNetMlp
from .modules import FocalModulation, is_changed

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


@dataclass(frozen=True)
class _Packed:
    """A block's packed weights, or the reason why it cannot have any, and what tells that this still holds."""

    arguments: tuple | None
    reason: str | None
    settings: tuple
    modules: list[nn.Module]
    changed: list[bool]
    # The dictionaries in which modules and parameters hang, with their content at the time.
    registries: list[tuple[dict, list]]
    # Aliases keep the storage alive: no other tensor can take its address.
    parameters: list[tuple[Tensor, Tensor, int]]

    def is_current(self, settings: tuple) -> bool:
        return (
            self.settings == settings
            and list(map(is_changed, self.modules)) == self.changed
            and all(_holds(registry, content) for registry, content in self.registries)
            and all(p.data_ptr() == alias.data_ptr() and _version(p) == v for p, alias, v in self.parameters)
        )


_packed: weakref.WeakKeyDictionary[FocalNetLayer, _Packed] = weakref.WeakKeyDictionary()


def reason_against(layer: FocalNetLayer, hidden_state: Tensor) -> str | None:
    """Why the fused operator cannot take this call, or None if it can."""
    if torch.is_grad_enabled() or layer.training or layer.mlp.drop.training or layer.drop_path.training:
        return "gradients are being computed, or the block is in training mode"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "the call is being traced or transformed"
    if type(hidden_state) is not Tensor or hidden_state.device.type != "cpu" or hidden_state.dtype != torch.float32:
        return f"expected a plain float32 tensor on the CPU, got {hidden_state.dtype} on {hidden_state.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if (backend := requested(layer.modulation.backend)) not in (None, "cpu"):
        return f"backend {backend!r} was asked for"
    return extension.missing() or _packed_of(layer).reason


def run(layer: FocalNetLayer, hidden_state: Tensor) -> Tensor:
    """``layer(hidden_state)``, (B, H, W, C) -> (B, H, W, C), where `reason_against` has none."""
    return torch.ops.focalnet.cpu_block(hidden_state, *_packed[layer].arguments)


def forget(layer: FocalNetLayer) -> None:
    """Drop what was packed of ``layer``."""
    _packed.pop(layer, None)


def _packed_of(layer: FocalNetLayer) -> _Packed:
    packed, settings = _packed.get(layer), _settings(layer)
    if packed is None or not packed.is_current(settings):
        modules = list(layer.modules())[1:]
        registries = [r for m in (layer, *modules) for r in (m._modules, m._parameters) if r]
        reason = _unusual_part(layer)
        packed = _Packed(
            arguments=None if reason else _pack(layer),
            reason=reason,
            settings=settings,
            modules=modules,
            changed=list(map(is_changed, modules)),
            registries=[(registry, list(registry.values())) for registry in registries],
            parameters=[(p, p.detach(), _version(p)) for p in layer.parameters()],
        )
        _packed[layer] = packed
    return packed


def _settings(layer: FocalNetLayer) -> tuple:
    """What is neither module nor parameter, and yet decides what the block computes."""
    modulation = layer.modulation
    norms = (layer.norm1, layer.norm2, getattr(modulation, "layernorm", None))
    return (
        layer.use_post_layernorm,
        getattr(modulation, "use_post_layernorm_in_modulation", None),
        getattr(modulation, "normalize_modulator", None),
        *(getattr(norm, "eps", None) for norm in norms),
    )


def _holds(registry: dict, content: list) -> bool:
    return len(registry) == len(content) and all(map(operator.is_, registry.values(), content))


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _unusual_part(layer: FocalNetLayer) -> str | None:
    for name, module in list(layer.named_modules())[1:]:
        kinds = next((kinds for pattern, kinds in _PARTS if re.fullmatch(pattern, name)), ())
        if type(module) not in kinds or is_changed(module):
            return f"{name} is {type(module).__name__}, or was wrapped or hooked; expected a plain part of a block"
    activation = layer.mlp.activation
    if getattr(activation, "act", None) is not F.gelu and getattr(activation, "approximate", None) != "none":
        return "the MLP's activation is not the exact GELU"
    for name, parameter in layer.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or parameter.is_inference():
            return f"{name} is {parameter.dtype} on {parameter.device}, or was made in inference mode"
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
    inner = modulation.layernorm if modulation.use_post_layernorm_in_modulation else None
    return (
        pack(modulation.projection_in, before[0]),
        [level[0].weight for level in modulation.focal_layers],
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

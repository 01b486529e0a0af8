"""The block in inference on a CPU: one operator instead of some twenty, with its weights packed once.

`reason_against` says whether a call can go there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block_parts import BlockNames, BlockParts, is_random
from .mlp import FocalNetMlp
from .modules import FocalModulation
from .packing import arguments_of, forget, packed_of, reason_against_call

OURS = BlockNames(modulation=FocalModulation, mlp=FocalNetMlp)


def reason_against(
    block: nn.Module, hidden_state: Tensor, backend: str | None = None, names: BlockNames = OURS
) -> str | None:
    """Why the fused operator cannot take this call of a block whose parts have ``names``, or None if it can."""
    if block.training:
        forget(block)  # optimisers may write through .data, which nothing counts
        return "the block is in training mode"
    if reason := reason_against_call(hidden_state, backend):
        return reason
    # Focal weights are packed for the vectors of the instruction set.
    settings = (torch.ops.focalnet.cpu_isa(), *names.settings_of(block))
    packed = packed_of(block, settings, lambda: names.unusual_part(block), lambda: pack(names.parts_of(block)))
    if any(module.training and is_random(module) for module in packed.modules):
        return "dropout or stochastic depth is in training mode"
    return packed.reason


def run(block: nn.Module, hidden_state: Tensor) -> Tensor:
    """``block(hidden_state)``, (B, H, W, C) -> (B, H, W, C), where `reason_against` has none."""
    return torch.ops.focalnet.cpu_block(hidden_state, *arguments_of(block))


def compute(parts: BlockParts, hidden_state: Tensor) -> Tensor:
    """What a block of these parts makes of ``hidden_state`` (B, H, W, C); nothing is kept for the next call."""
    return torch.ops.focalnet.cpu_block(hidden_state, *pack(parts))


def pack(parts: BlockParts) -> tuple:
    """The arguments of the operator after ``hidden_state``.

    The affine part of a LayerNorm that stands before a linear layer is folded into it, and so is a layer scale that
    stands behind one; behind the branch, norm and layer scale become one affine norm.
    """

    def linear(layer: nn.Module, norm: nn.LayerNorm | None = None, gamma: Tensor | None = None) -> Tensor:
        scale, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        return torch.ops.focalnet.cpu_pack_linear(layer.weight.flatten(1), layer.bias, scale, shift, gamma)

    def affine(norm: nn.LayerNorm, gamma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if not parts.post_norm:
            return None, None
        return (norm.weight, norm.bias) if gamma is None else (gamma * norm.weight, gamma * norm.bias)

    before = (None, None) if parts.post_norm else (parts.norm1, parts.norm2)
    behind = (None, None) if parts.post_norm else (parts.gamma_1, parts.gamma_2)
    focal_weights = [conv.weight for conv in parts.focal_convs]
    inner = parts.layernorm
    return (
        linear(parts.projection_in, before[0]),
        torch.ops.focalnet.cpu_pack_focal(focal_weights),
        [size for weight in focal_weights for size in weight.shape[2:]],
        linear(parts.projection_context),
        linear(parts.projection_out, inner, behind[0]),
        linear(parts.fc1, before[1]),
        linear(parts.fc2, None, behind[1]),
        *affine(parts.norm1, parts.gamma_1),
        *affine(parts.norm2, parts.gamma_2),
        parts.norm1.eps,
        parts.norm2.eps,
        None if inner is None else inner.eps,
        parts.normalize_modulator,
    )

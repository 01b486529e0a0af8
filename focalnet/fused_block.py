"""The block in inference on a CPU: one operator instead of some twenty. Narrow blocks have their weights packed once;
those of wide ones, nearly all of a model's, are read where they are, so that no copy stands beside them.

`reason_against` says whether a call can go there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .block_parts import BlockNames, BlockParts, is_random
from .mlp import FocalNetMlp
from .modules import FocalModulation
from .packing import Packed, arguments_of, forget, packed_of, reason_against_call

# Channels of a block whose weights (up to 3 MB, 12 C^2 floats) are packed once. Beyond, packing slice by slice costs
# some per cent of the time, and saves the memory of the model's weights.
WIDEST_PACKED = 256

OURS = BlockNames(modulation=FocalModulation, mlp=FocalNetMlp)


def reason_against(
    block: nn.Module, hidden_state: Tensor, backend: str | None = None, names: BlockNames = OURS
) -> str | None:
    """Why the fused operator cannot take this call of a block whose parts have ``names``, or None if it can."""
    return reason_against_chain([block], hidden_state, backend, names)


def reason_against_chain(
    blocks: Sequence[nn.Module], hidden_state: Tensor, backend: str | None = None, names: BlockNames = OURS
) -> str | None:
    """Why fused operators cannot take a call of ``blocks``, one behind the other, or None if they can.

    Asking before the first block costs half of asking before every one: what a block leaves in the caches is weights.
    """
    if training := [block for block in blocks if block.training]:
        for block in training:
            forget(block)  # optimisers may write through .data, which nothing counts
        return "the block is in training mode"
    if reason := reason_against_call(hidden_state, backend):
        return reason
    # Focal weights are packed for the vectors of the instruction set.
    settings = (torch.ops.focalnet.cpu_isa(),)
    reasons = (_packed_of(block, settings, names).reason for block in blocks)
    return next(filter(None, reasons), None)


def _packed_of(block: nn.Module, settings: tuple, names: BlockNames) -> Packed:
    return packed_of(block, settings, lambda: _unusual(block, names), lambda: pack(names.parts_of(block)))


def _unusual(block: nn.Module, names: BlockNames) -> str | None:
    if any(module.training and is_random(module) for module in block.modules()):
        return "dropout or stochastic depth is in training mode"
    return names.unusual_part(block)


def run(block: nn.Module, hidden_state: Tensor) -> Tensor:
    """``block(hidden_state)``, (B, H, W, C) -> (B, H, W, C), where `reason_against` has none."""
    return torch.ops.focalnet.cpu_block(hidden_state, *arguments_of(block))


def compute(parts: BlockParts, hidden_state: Tensor) -> Tensor:
    """What a block of these parts makes of ``hidden_state`` (B, H, W, C); nothing is kept for the next call."""
    return torch.ops.focalnet.cpu_block(hidden_state, *pack(parts))


def pack(parts: BlockParts) -> tuple:
    """The arguments of the operator after ``hidden_state``.

    A layer scale is a factor of the weights it stands behind; behind the branch, norm and layer scale are one norm.
    """

    narrow = parts.fc1.weight.shape[1] <= WIDEST_PACKED

    def linear(layer: nn.Module, gamma: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        weight = layer.weight.flatten(1).contiguous()
        return (
            (torch.ops.focalnet.cpu_pack_linear(weight, layer.bias, gamma), None) if narrow else (weight, layer.bias)
        )

    def affine(norm: nn.LayerNorm, gamma: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight
        bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
        return (weight, bias, norm.eps) if gamma is None else (gamma * weight, gamma * bias, norm.eps)

    gammas = (parts.gamma_1, parts.gamma_2)
    behind_norm, behind_layer = (gammas, (None, None)) if parts.post_norm else ((None, None), gammas)
    focal_weights = [conv.weight for conv in parts.focal_convs]
    return (
        *linear(parts.projection_in),
        torch.ops.focalnet.cpu_pack_focal(focal_weights),
        [size for weight in focal_weights for size in weight.shape[2:]],
        *linear(parts.projection_context),
        *linear(parts.projection_out, behind_layer[0]),
        *linear(parts.fc1),
        *linear(parts.fc2, behind_layer[1]),
        *affine(parts.norm1, behind_norm[0]),
        *affine(parts.norm2, behind_norm[1]),
        *((None, None, None) if parts.layernorm is None else affine(parts.layernorm)),
        *behind_layer,
        parts.post_norm,
        parts.normalize_modulator,
    )

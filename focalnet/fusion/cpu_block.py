"""The block in inference on a CPU: one operator instead of some twenty.

`arguments` gives what the operator takes, or says why it cannot take a call; `run` calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block_parts import BlockNames
from .cpu_inference import reason_against_call, reason_against_dtype, reason_against_weights


def arguments(block: nn.Module, names: BlockNames, hidden_state: Tensor, backend: str | None = None) -> tuple | str:
    """What the operator takes beside ``hidden_state`` for this call of a block whose parts have ``names``.

    The reason instead, where the block has to be called module by module.
    """
    if reason := reason_against_call(hidden_state, backend):
        return reason
    found = weights(block, names)
    return reason_against_dtype(hidden_state, found) or found


def weights(block: nn.Module, names: BlockNames) -> tuple | str:
    """The same, whatever the call is."""
    if block.training:
        return "the block is in training mode"
    found = names.weights_of(block)
    if isinstance(found, str):
        return found
    arguments, tensors = found
    return reason_against_weights(tensors, block) or arguments


def run(hidden_state: Tensor, arguments: tuple) -> Tensor:
    """What the block makes of ``hidden_state``, (B, H, W, C) -> (B, H, W, C); ``arguments`` are not a reason."""
    return torch.ops.focalnet.cpu_block(hidden_state, *arguments)

"""A block in inference on a CPU: one operator replaces about twenty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..backends.registry import requested
from .block_parts import BlockParts
from .cpu_inference import Precision, kernel, why_not_call, why_not_weights
from .gate import while_unchanged

Call = list[Any]  # [operator, its arguments behind the map]


def runner(
    block: nn.Module, kind: BlockParts, hidden_state: Tensor, backend: str | None = None
) -> Callable[[Tensor], Tensor] | str:
    """A function that computes ``block``, (B, H, W, C) -> (B, H, W, C), for maps like ``hidden_state``.

    Returns the reason as a string if the block must be called module by module. ``kind`` describes its parts.
    """
    if reason := why_not_call(hidden_state):
        return reason
    found = _call(block, kind, Precision.of(hidden_state), requested(backend))
    if isinstance(found, str):
        return found
    operator, arguments = found
    return lambda x: operator(x, *arguments)


def call(
    block: nn.Module, kind: BlockParts, precision: Precision, backend: str | None, *, own_threads: bool = False
) -> Call | str:
    """[the operator, its arguments after the map], or the reason why it cannot run.

    ``own_threads``: the operator uses threads of its own, which sleep while they wait, and not PyTorch's, which spin.
    This is for calls in which no operator of PyTorch runs in parallel.
    """
    if block.training:
        return "the block is in training mode"
    run = kernel("block", precision.dtype, backend)
    if isinstance(run, str):
        return run
    found = kind.random_part(block) or kind.weights_of(block)
    if isinstance(found, str):
        return found
    arguments, tensors = found
    return why_not_weights(tensors, precision, block) or [run, [*arguments, own_threads, precision.rounded]]


_call = while_unchanged(call)

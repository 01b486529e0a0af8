"""Helpers for gradients: packing optional ones for a torch.library schema, and gradients of gradients.

A schema cannot return a list of optional tensors, so an empty tensor replaces None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pack(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The gradients as contiguous tensors, with an empty tensor for each None."""
    return [like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


def unpack(gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients given to `pack`, with None for those that are not ``wanted``."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def composed_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of ``function(*inputs)``; None for inputs that do not require one."""
    # Use aliases, because an input may depend on another input or be the same tensor.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    if not wanted:
        return [None] * len(aliases)
    gradients = iter(torch.autograd.grad(function(*aliases), wanted, dout, create_graph=True))
    return [next(gradients) if alias is not None and alias.requires_grad else None for alias in aliases]

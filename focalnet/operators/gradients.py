"""Gradients as a torch.library schema can pass them, which has no list of optional tensors; gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pack(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """What was not asked for travels as an empty tensor."""
    return [like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


def unpack(gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What `pack` was given, by what was asked for."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def composed_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)``, differentiable themselves; None where none is wanted."""
    # Through aliases, since an input may depend on another, or be the same tensor.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    if not wanted:
        return [None] * len(aliases)
    gradients = iter(torch.autograd.grad(function(*aliases), wanted, dout, create_graph=True))
    return [next(gradients) if alias is not None and alias.requires_grad else None for alias in aliases]

"""Gradients as a torch.library schema can pass them: it has no list of optional tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """What was not asked for travels as an empty tensor."""
    return [like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


def unpack(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What `pack` was given, by what was asked for."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]

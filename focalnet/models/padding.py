"""Padding of maps up to a multiple of the patch size, and cutting it off again: right at every size, in eager mode and
in every exported graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """``x`` (B, H, W, C) with zeros below and to the right, so that H and W are multiples of ``patch_size``."""
    bottom, right = _missing(x.shape[1], patch_size[0]), _missing(x.shape[2], patch_size[1])
    if _is_never_needed(bottom) and _is_never_needed(right):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def cut_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The top left of ``x`` (B, C, H, W), of the given height and width, which are no larger."""
    height, width = size
    if not torch.compiler.is_compiling():
        return x[..., :height, :width]
    # A slice would ask whether it is all of x, and hold for the sizes with that answer alone.
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


def _missing(size: int, patch: int) -> int:
    # Not -size % patch: torch.export solves inequalities of quotients, and none of remainders.
    return (size + patch - 1) // patch * patch - size


def _is_never_needed(padding: int) -> bool:
    """Whether ``padding`` is 0 now, and in every later call of the graph that is being made, if one is.

    An exporter or a compiler with dynamic sizes has a symbol for a size, torch.jit.trace a tensor, torch.fx a proxy:
    a branch on one would leave the padding of the example's size in the graph, or split the sizes the graph is for.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(padding == 0)
    return type(padding) is int and padding == 0

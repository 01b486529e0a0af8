"""Padding of maps to a multiple of the patch size, and cropping. Both are correct at every size, in eager mode and in
exported graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """``x`` (B, H, W, C) padded with zeros at the bottom and the right to multiples of ``patch_size``."""
    bottom, right = _missing(x.shape[1], patch_size[0]), _missing(x.shape[2], patch_size[1])
    if _is_never_needed(bottom) and _is_never_needed(right):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def cut_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The top left of ``x`` (B, C, H, W) with the given height and width, which must not exceed H and W."""
    height, width = size
    if not torch.compiler.is_compiling():
        return x[..., :height, :width]
    # A slice would branch on whether it covers all of x, and the graph would be valid only for sizes on that branch.
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


def _missing(size: int, patch: int) -> int:
    # torch.export can solve inequalities of quotients but not of remainders, so -size % patch would not do.
    return (size + patch - 1) // patch * patch - size


def _is_never_needed(padding: int) -> bool:
    """Whether ``padding`` is 0 now and, while a graph is being recorded, in every later call of that graph.

    A size is a symbol to exporters and compilers with dynamic sizes, a tensor to torch.jit.trace, a proxy to torch.fx.
    A branch on one would record the padding of the example's size, or restrict the sizes that the graph accepts.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(padding == 0)
    return type(padding) is int and padding == 0

"""Whole blocks: in inference on a CPU a patched block is one operator; everywhere else its own forward runs.

Blocks are recognised like modulations (see `modulation`): by structure, then by a trial. The block of X-Decoder and
SEEM has additional convolutions, so only its modulation is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..fusion import cpu_block
from ..fusion.block_parts import BlockParts
from ..fusion.cpu_inference import Precision
from ..fusion.module_checks import is_proxy, part
from ..fusion.part_names import BLOCK, IN_EVERY_BLOCK
from . import modulation

PARTS = {source: BlockParts(names, forward=modulation.forward) for source, names in BLOCK.items()}


def is_candidate(module: nn.Module) -> bool:
    """Whether ``module`` may be a block: it has a focal modulation, norms and an MLP."""
    children = module._modules
    return all(name in children for name in IN_EVERY_BLOCK) and modulation.is_candidate(part(module, "modulation"))


def why_not(block: nn.Module, source: str) -> str | None:
    """The first part of ``block`` that the operator does not expect of a block of ``source``, or None if all fit."""
    children = block._modules.keys()
    if unknown := sorted(children - BLOCK[source].children | block._buffers.keys()):
        return f"it also has {', '.join(unknown)}"
    if missing := sorted(BLOCK[source].children - children):
        return f"it has no {', '.join(missing)}"
    return PARTS[source].unusual_part(block)


def fused(block: nn.Module, x: Tensor, source: str) -> Tensor:
    """The operator's result for x (B, H, W, C) on the CPU, for the trial. ValueError if it cannot run ``block``."""
    found = cpu_block.call(block, PARTS[source], Precision.of(x), "cpu")
    if isinstance(found, str):
        raise ValueError(found)
    operator, arguments = found
    return operator(x, *arguments)


def forward_tokens(
    block: nn.Module, hidden_state: Tensor, input_dimensions: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """The forward of a patched block of transformers, (B, H * W, C) -> (B, H * W, C)."""
    result = _of_grid(block, hidden_state, input_dimensions, backend, "transformers")
    return type(block).forward(block, hidden_state, input_dimensions) if result is None else result


def forward_sized(block: nn.Module, x: Tensor, *, backend: str | None = None) -> Tensor:
    """The forward of a patched block of the authors, (B, H * W, C) -> (B, H * W, C), H and W from the block."""
    sized: Any = block
    result = _of_grid(block, x, (sized.H, sized.W), backend, "authors")
    return type(block).forward(block, x) if result is None else result


def forward_map(block: nn.Module, x: Tensor, *, backend: str | None = None) -> Tensor:
    """The forward of a patched block of timm, (B, C, H, W) -> (B, C, H, W), channels-last in memory."""
    run = cpu_block.runner(block, PARTS["timm"], x, _asked(block, backend)) if _is_map(x) else "x is no map"
    if isinstance(run, str):
        return type(block).forward(block, x)
    return run(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _of_grid(
    block: nn.Module, tokens: Tensor, size: tuple[int | None, int | None], backend: str | None, source: str
) -> Tensor | None:
    """The operator's result for tokens (B, H * W, C), or None if the block's own forward must run."""
    grid = _grid(tokens, size)
    if grid is None:
        return None
    run = cpu_block.runner(block, PARTS[source], grid, _asked(block, backend))
    return None if isinstance(run, str) else run(grid).flatten(1, 2)


def _asked(block: nn.Module, backend: str | None) -> str | None:
    """The backend that the block was patched with, else that of its modulation, which may have been patched alone."""
    bound = block._modules["modulation"].__dict__.get("forward")
    return backend or getattr(bound, "keywords", {}).get("backend")


FORWARD: dict[str, Callable[..., Tensor]] = {
    "transformers": forward_tokens,
    "authors": forward_sized,
    "timm": forward_map,
}


def own_forward(block: nn.Module, x: Tensor, source: str) -> Tensor:
    """The result of the class's own forward for x (B, H, W, C), in the same layout."""
    height, width = x.shape[1:3]
    if source == "timm":
        return type(block).forward(block, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if source == "transformers":
        return type(block).forward(block, x.flatten(1, 2), (height, width)).unflatten(1, (height, width))
    sized: Any = block
    sized.H, sized.W = height, width
    return type(block).forward(block, x.flatten(1, 2)).unflatten(1, (height, width))


def _is_map(x: Tensor) -> bool:
    return not is_proxy(x) and x.ndim == 4


def _grid(tokens: Tensor, size: tuple[int | None, int | None]) -> Tensor | None:
    """Tokens (B, H * W, C) as a map (B, H, W, C), or None if they do not fit; the block's own forward reports that."""
    height, width = size
    if is_proxy(tokens) or tokens.ndim != 3 or height is None or width is None or tokens.shape[1] != height * width:
        return None
    return tokens.contiguous().unflatten(1, (height, width))

"""What a FocalNet looks at: gates, contexts and modulators of its blocks, for given images.

Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926, section 3.2 and figures 4 and 5.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .fusion.context_parts import convolutions, widest_kernel
from .fusion.module_checks import part
from .fusion.part_names import MODULATION, ModulationNames
from .onednn import guarded
from .patching.modulation import is_candidate, source_of

Place = tuple[int, int]
Blocks = Literal["all", "last"] | Iterable[Place]


@dataclass(frozen=True)
class BlockMaps:
    """What the focal modulation of one block computed for a batch of images.

    Maps are channels-last, without gradients, in the dtype and on the device of the block. L is the number of focal
    levels.

    Attributes:
        name: name of the modulation in the model.
        stage: index of the stage, from 0.
        block: index of the block in its stage, from 0.
        gates: (B, H, W, L + 1), linear, of either sign; the last gate is that of the global context.
        contexts: L maps (B, H, W, C), one for each level, then the global context (B, 1, 1, C).
        aggregated: (B, H, W, C), the sum of gates times contexts, divided by L + 1 if the block normalises.
        modulator: (B, H, W, C), the 1x1 convolution of ``aggregated``; the block multiplies its query by it.
        receptive_field: (height, width) in positions of the map that a context of each level depends on: L pairs that
            grow level by level, then (H, W). At a border the map ends earlier.
    """

    name: str
    stage: int
    block: int
    gates: Tensor
    contexts: tuple[Tensor, ...]
    aggregated: Tensor
    modulator: Tensor
    receptive_field: tuple[tuple[int, int], ...]

    @property
    def modulator_norm(self) -> Tensor:
        """(B, H, W), the Euclidean norm of the modulator at every position."""
        return self.modulator.norm(dim=-1)


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        output: what the model returned.
        maps: the maps of every block that was asked for, in the order of the network.
    """

    output: Any
    maps: tuple[BlockMaps, ...]

    def at(self, stage: int, block: int = -1) -> BlockMaps:
        """The maps of a block; negative indices count from the end, among the blocks that were asked for.

        Raises:
            ValueError: no maps of such a block are there.
        """
        stages = sorted({maps.stage for maps in self.maps})
        wanted = stages[stage] if -len(stages) <= stage < 0 else stage
        of_stage = [maps for maps in self.maps if maps.stage == wanted]
        found = {maps.block: maps for maps in of_stage} | {
            index: of_stage[index] for index in range(-len(of_stage), 0)
        }
        if block not in found:
            there = ", ".join(f"({maps.stage}, {maps.block})" for maps in self.maps)
            raise ValueError(f"stage, block: expected one of {there}, got ({stage}, {block})")
        return found[block]


def inspect(model: nn.Module, pixel_values: Tensor, *, blocks: Blocks = "all") -> Inspection:
    """Run ``model`` on images and return its output with the gates, contexts and modulators of its blocks.

    Works on this package's models and layers, and on models of transformers, timm and the authors, patched or not.
    The model is not changed: for the time of the call it has hooks, and every block that is looked at runs module by
    module. The call is not for several threads on one model at a time.

    Args:
        model: a model in evaluation mode.
        pixel_values: what the model is called with, images (B, 3, H, W).
        blocks: "all", "last" for the last block of each stage, or pairs (stage, block) from 0, where negative numbers
            count from the end. Only the maps of these blocks are kept, which bounds the memory.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no focal modulation, is in training mode or has no such block; or a block computes
            something else than focal modulation, so that the maps would not be those it used.
        RuntimeError: a block was not called, as in a compiled or traced model.

    Examples:
        >>> maps = focalnet.inspect(model, pixel_values, blocks="last").at(stage=0)
        >>> maps.gates.shape, maps.modulator_norm.shape
        (torch.Size([1, 56, 56, 4]), torch.Size([1, 56, 56]))
    """
    found = places(model)
    if model.training:
        raise ValueError(
            "model: expected evaluation mode, because dropout would draw the maps anew, got training mode; "
            "call model.eval() first"
        )
    wanted = _chosen(found, blocks)
    kept: dict[Place, BlockMaps] = {}
    hooks = [
        module.register_forward_hook(functools.partial(_keep, kept, place, name), with_kwargs=True)
        for place, (name, module) in wanted.items()
    ]
    try:
        with torch.no_grad():
            output = model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for place, (name, _) in wanted.items() if place not in kept]:
        raise RuntimeError(
            f"model: {missing[0]} was not called as a module, as in a compiled or traced model; inspect the model "
            f"that it was made from"
        )
    return Inspection(output, tuple(kept[place] for place in wanted))


def places(model: nn.Module) -> dict[Place, tuple[str, nn.Module]]:
    """The name and the module of every focal modulation in ``model``, by (stage, block), in the model's order.

    A stage is a container of blocks.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no focal modulation.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    stages: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in _modulations(model):
        stages.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append((name, module))
    if not stages:
        raise ValueError(
            f"model: expected a model with focal modulation of transformers, timm, the authors or focalnet, "
            f"got {type(model).__name__} without any"
        )
    return {
        (stage, block): found for stage, of_stage in enumerate(stages.values()) for block, found in enumerate(of_stage)
    }


def _modulations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_script = isinstance(module, torch.jit.ScriptModule)
        if is_candidate(module) and not is_script and source_of(module) is not None:
            yield name, module


def _chosen(found: dict[Place, tuple[str, nn.Module]], blocks: Blocks) -> dict[Place, tuple[str, nn.Module]]:
    depths: dict[int, int] = {}
    for stage, _ in found:
        depths[stage] = depths.get(stage, 0) + 1
    if blocks == "all":
        return found
    if blocks == "last":
        chosen = {(stage, depth - 1) for stage, depth in depths.items()}
    elif isinstance(blocks, str):
        raise ValueError(f'blocks: expected "all", "last" or pairs (stage, block), got {blocks!r}')
    else:
        chosen = {_from_the_start(place, depths) for place in blocks}
    if not chosen:
        raise ValueError("blocks: expected at least one pair (stage, block), got none")
    return {place: module for place, module in found.items() if place in chosen}


def _from_the_start(place: Place, depths: dict[int, int]) -> Place:
    stage, block = place
    from_start = stage + len(depths) if stage < 0 else stage
    depth = depths.get(from_start, 0)
    if not -depth <= block < depth:
        raise ValueError(
            f"blocks: expected (stage, block) of {len(depths)} stages with {', '.join(map(str, depths.values()))} "
            f"blocks, got {place}"
        )
    return from_start, block % depth


def _keep(
    kept: dict[Place, BlockMaps],
    place: Place,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: object,
) -> None:
    """A forward hook: computes the maps from the input again and compares what follows from them with the output."""
    hidden_state = args[0] if args else next(iter(kwargs.values()))
    names = MODULATION[source_of(module) or ""]
    q, gates, contexts = _context_of(module, names, hidden_state)
    agg: Any = sum(gates[:, level : level + 1] * context for level, context in enumerate(contexts))
    if any(getattr(module, flag, False) for flag in names.normalize):
        agg = agg / len(contexts)
    modulator = part(module, names.projection_context)(agg)
    if reason := _why_not_the_output(module, names, q * modulator, output):
        raise ValueError(f"model: {name} computes something else than focal modulation: {reason}")
    kept[place] = BlockMaps(
        name,
        *place,
        gates=_channels_last(gates),
        contexts=tuple(map(_channels_last, contexts)),
        aggregated=_channels_last(agg),
        modulator=_channels_last(modulator),
        receptive_field=(*_receptive_fields(part(module, "focal_layers")), (gates.shape[2], gates.shape[3])),
    )


def _context_of(
    module: nn.Module, names: ModulationNames, hidden_state: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q, gates and the contexts of all levels and the global one, channels first, by calling the module's parts."""
    levels: Any = part(module, "focal_layers")
    projected = part(module, names.projection_in)(hidden_state)
    if not names.channels_first:
        projected = projected.permute(0, 3, 1, 2)
    channels = (projected.shape[1] - len(levels) - 1) // 2
    q, context, gates = projected.split([channels, channels, len(levels) + 1], dim=1)
    contexts = []
    with guarded(context, widest_kernel(levels)):
        for level in levels:
            context = level(context)
            contexts.append(context)
    activation = module._modules.get(names.activation) or nn.functional.gelu
    return q, gates, [*contexts, activation(context.mean((2, 3), keepdim=True))]


def _why_not_the_output(module: nn.Module, names: ModulationNames, out: Tensor, output: object) -> str | None:
    if not names.channels_first:
        out = out.permute(0, 2, 3, 1)
    for name in (names.layernorm, names.projection_out):
        behind = module._modules.get(name)
        out = out if behind is None else behind(out)
    if not isinstance(output, Tensor) or output.shape != out.shape:
        return "it returns no map of the shape of its input"
    if output.numel() == 0 or not output.isfinite().all():
        return None
    # Half of the digits of the dtype, because sums may run in another order.
    off = ((out - output).abs().max() / output.abs().max()).item()
    if not off <= torch.finfo(out.dtype).eps ** 0.5:
        return f"its output differs by {off:.1e} of the largest value from what its parts give"
    return None


def _receptive_fields(focal_layers: nn.Module) -> list[tuple[int, int]]:
    fields = []
    height = width = 1
    for convolution in convolutions(focal_layers):
        kernel_height, kernel_width = _kernel_size(convolution)
        height, width = height + kernel_height - 1, width + kernel_width - 1
        fields.append((height, width))
    return fields


def _kernel_size(convolution: Any) -> tuple[int, int]:
    # Wrappers such as adapters have the convolution inside.
    inner = next(module for module in convolution.modules() if hasattr(module, "kernel_size"))
    height, width = inner.kernel_size
    return height, width


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()

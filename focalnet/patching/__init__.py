"""One line that makes a model that exists already fast: `patch`, and `unpatch`, which undoes it.

``forward`` is rebound on the live modules that compute focal modulation. Everything else stays as it is: weights and
their names, the identity of every parameter, hooks, classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..backends import extension
from ..backends.registry import requested
from ..fusion.module_checks import part
from ..fusion.part_names import MODULATION
from ..modules import FocalModulation
from . import block, embeddings, modulation, probe
from .report import Entry, PatchReport
from .traced import REASON as TRACED
from .traced import traced_parts

__all__ = ["Entry", "PatchReport", "patch", "unpatch"]

logger = logging.getLogger(__name__)


def patch(model: nn.Module, backend: str | None = None, *, keep_modulator: bool = False) -> PatchReport:
    """Lets focalnet's operators run every focal modulation in ``model``, in place.

    A focal modulation is known by its structure: that of transformers' FocalNet, timm's, the authors' (classification,
    detection, segmentation) and what was made from theirs, such as X-Decoder, SEEM, FocalNet-DINO, detrex, MaskDINO.
    None of those packages is needed. A module whose structure fits is tried out on a random input before it is
    touched, and left alone if it computes something else. Where the block around a modulation is known too, float32
    inference on a CPU runs it as one operator. Patch embeddings that pad do so at every size in exported graphs.

    Args:
        model: any module; what it holds is searched.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the first that can run a call.
        keep_modulator: at every call, write ``gates`` (B, L + 1, H, W) and ``modulator`` (B, C, H, W) to each
            modulation, as the authors' modules do for visualisation. Otherwise they are not kept, and what an earlier
            call left behind is removed, lest it be taken for that of a later one.

    Returns:
        What was replaced, and what was left alone and why; ``print`` it to see a table. Patching again is harmless:
        ``backend`` and ``keep_modulator`` are then those of the last call.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in ``model`` has focal layers, or no backend has the given name.
    """
    _check(model)
    requested(backend)
    position = {name: index for index, (name, _) in enumerate(model.named_modules())}
    entries = sorted(_entries(model, backend, keep_modulator), key=lambda entry: position[entry.name])
    report = PatchReport(tuple(entries))
    if not report.entries:
        raise ValueError(
            f"model: expected a model with focal modulation, but none of the {len(list(model.modules()))} modules of "
            f"this {type(model).__name__} has focal_layers"
        )
    if not report.replaced:
        logger.warning("focalnet.patch replaced nothing in this %s:\n%s", type(model).__name__, report)
    return report


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Undoes `patch`: every module gets its class's own forward back. Returns the names of those that had not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    patched = [(name, module) for name, module in model.named_modules() if _is_patched(module)]
    for _, module in patched:
        module.__dict__.pop("forward", None)  # another thread may have been faster
    return tuple(name for name, _ in patched)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _entries(model: nn.Module, backend: str | None, keep_modulator: bool) -> Iterator[Entry]:
    in_a_graph = traced_parts(model)
    for name, module in model.named_modules():
        if name in in_a_graph and modulation.is_candidate(module):
            yield Entry(name, "modulation", modulation.source_of(module), TRACED)
        elif modulation.is_candidate(module):
            yield _patch_modulation(name, module, backend, keep_modulator)
    for name, module in model.named_modules():
        if not block.is_candidate(module) or not _is_patched(part(module, "modulation")):
            continue
        if name in in_a_graph:
            yield Entry(name, "block", modulation.source_of(part(module, "modulation")), TRACED)
        else:
            yield _patch_block(name, module, backend, keep_modulator)
    if any(map(_is_patched, model.modules())):
        for name, module in model.named_modules():
            if name not in in_a_graph and embeddings.pads(module):
                yield _patch_embeddings(name, module)


class Rebound(functools.partial[Any]):
    """The forward of a patched module: one of this package's functions, given the module and the settings.

    Not a bound method, since that cannot be pickled with the module that it belongs to.
    """

    @property
    def __globals__(self) -> dict[str, Any]:
        # torch.jit.script asks for these when it comes to compile a forward; whoever else does can go without.
        raise AttributeError(
            "torch.jit.script cannot compile a module that focalnet.patch has patched. Call focalnet.unpatch(model) "
            "first, or use torch.jit.trace, torch.export or torch.compile, which can."
        )


def _is_patched(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Rebound)


def _patch_modulation(name: str, module: nn.Module, backend: str | None, keep_modulator: bool) -> Entry:
    reason = _why_not_rebinding(module)
    source = None if isinstance(module, torch.jit.ScriptModule) else modulation.source_of(module)
    reason = reason or _why_not_modulation(module, source)
    if reason is None:
        for kept in modulation.KEPT:
            module.__dict__.pop(kept, None)
        settings = {"source": source, "backend": backend, "keep_modulator": keep_modulator}
        module.forward = Rebound(modulation.forward, module, **settings)
    return Entry(name, "modulation", source, reason)


def _patch_embeddings(name: str, module: nn.Module) -> Entry:
    reason = _why_not_rebinding(module)
    if reason is None:
        module.forward = Rebound(embeddings.forward, module)
    return Entry(name, "patch embeddings", embeddings.source_of(module), reason)


def _patch_block(name: str, module: nn.Module, backend: str | None, keep_modulator: bool) -> Entry:
    rebound: Any = part(module, "modulation").forward
    source: str = rebound.keywords["source"]
    reason: str | None
    if keep_modulator:
        reason = "keep_modulator asks for what only the modulation can give"
    else:
        reason = extension.missing() or _why_not_rebinding(module) or _why_not_block(module, source)
    if reason is None:
        module.forward = Rebound(block.FORWARD[source], module, backend=backend)
    elif _is_patched(module):
        module.__dict__.pop("forward", None)
    return Entry(name, "block", source, reason)


def _why_not_block(module: nn.Module, source: str) -> str | None:
    return block.why_not(module, source) or probe.difference(
        module,
        own=functools.partial(block.own_forward, source=source),
        new=functools.partial(block.fused, source=source),
    )


def _why_not_rebinding(module: nn.Module) -> str | None:
    if isinstance(module, FocalModulation):
        return "it is focalnet's own"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript: patch the model before tracing or scripting it"
    if "forward" in module.__dict__ and not _is_patched(module):
        return "its forward was replaced by something else"
    return None


def _why_not_modulation(module: nn.Module, source: str | None) -> str | None:
    if source is None:
        return f"it has other parts than a focal modulation: {', '.join(module._modules)}"
    reason = modulation.why_not(module, source)
    return reason or probe.difference(
        module,
        own=lambda twin, x: _in_layout(type(twin).forward, twin, x, source),
        new=lambda twin, x: _in_layout(functools.partial(modulation.forward, source=source), twin, x, source),
    )


def _in_layout(forward: Callable[..., torch.Tensor], twin: nn.Module, x: torch.Tensor, source: str) -> torch.Tensor:
    """``forward(twin, x)`` in the layout of ``source``, for x (B, H, W, C)."""
    if not MODULATION[source].channels_first:
        return forward(twin, x)
    return forward(twin, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

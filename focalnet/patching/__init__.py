"""`patch` makes an existing model fast in one line; `unpatch` undoes it.

``forward`` is rebound on the live modules that compute focal modulation. Nothing else changes: weights and their
names, the identity of every parameter, hooks and classes stay the same.
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
    """Run every focal modulation in ``model`` with focalnet's operators. The model is changed in place.

    A focal modulation is recognised by its structure. Known structures are those of transformers' FocalNet, timm's,
    the authors' (classification, detection, segmentation) and the projects derived from theirs, such as X-Decoder,
    SEEM, FocalNet-DINO, detrex and MaskDINO. None of those packages is needed. A module with a matching structure is
    first tried on a random input, and is left alone if it computes something else. If the block around a modulation
    is known too, float32 inference on a CPU runs the whole block as one operator. Patch embeddings that pad are
    patched as well, so that exported graphs pad correctly at every size.

    Args:
        model: any module; all its submodules are searched.
        backend: "triton", "cuda", "cpu" or "reference"; None selects the first that can run each call.
        keep_modulator: at every call, write ``gates`` (B, L + 1, H, W) and ``modulator`` (B, C, H, W) to each
            modulation, as the authors' modules do for visualisation. If False they are not written, and values from
            earlier calls are removed, because they would be out of date.

    Returns:
        The modules that were replaced, and those that were left alone with the reason; ``print`` shows a table.
        Patching a model twice is allowed: the last call's ``backend`` and ``keep_modulator`` apply.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no module in ``model`` has focal layers, or no backend has the given name.
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
    """Undo `patch`: every patched module uses the forward of its class again.

    Returns:
        The names of the modules that were patched.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    patched = [(name, module) for name, module in model.named_modules() if _is_patched(module)]
    for _, module in patched:
        module.__dict__.pop("forward", None)  # another thread may have removed it already
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
    """The forward of a patched module: a function of this package, with the module and the settings bound to it.

    A bound method would not do, because it cannot be pickled together with its module.
    """

    @property
    def __globals__(self) -> dict[str, Any]:
        # torch.jit.script reads this when it compiles a forward, so this is the place to report that it cannot.
        raise AttributeError(
            "torch.jit.script cannot compile a module that focalnet.patch has patched. Call focalnet.unpatch(model) "
            "first, or use torch.jit.trace, torch.export or torch.compile, which support patched modules."
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
        reason = "keep_modulator needs the modulation to run by itself"
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

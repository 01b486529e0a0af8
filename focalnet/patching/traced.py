"""Finds modules inside torch.fx graphs. A graph holds a traced module's operations and never calls the module."""

from __future__ import annotations

import torch.fx
from torch import nn

REASON = (
    "its operations were traced into a torch.fx graph (a feature extractor, an exported program), which no longer "
    "calls the module; patch the model before tracing it"
)


def traced_parts(model: nn.Module) -> set[str]:
    """Names of the modules in ``model`` that were traced into a graph and are never called."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            prefix = name + "." if name else ""
            names |= {prefix + part for part in _not_called(module)}
    return names


def _not_called(graph: torch.fx.GraphModule) -> set[str]:
    called = tuple(f"{node.target}." for node in graph.graph.nodes if node.op == "call_module")
    return {name for name, _ in graph.named_modules() if name and not f"{name}.".startswith(called)}

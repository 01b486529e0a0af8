"""What torch.fx has traced: a graph holds the operations of modules, and never calls the modules it went into."""

from __future__ import annotations

import torch.fx
from torch import nn

REASON = (
    "its operations were traced into a torch.fx graph (a feature extractor, an exported program), which does not call "
    "it any more; patch the model before it is traced"
)


def traced_parts(model: nn.Module) -> set[str]:
    """The names of the modules in ``model`` that a graph has taken the place of."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            prefix = name + "." if name else ""
            names |= {prefix + part for part in _not_called(module)}
    return names


def _not_called(graph: torch.fx.GraphModule) -> set[str]:
    called = tuple(f"{node.target}." for node in graph.graph.nodes if node.op == "call_module")
    return {name for name, _ in graph.named_modules() if name and not f"{name}.".startswith(called)}

"""Who looks at a call from outside: where somebody does, modules are called one by one, and no operator stands in for
several of them.

docs/architecture.md has the table of everything that decides which code runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def why_not_fused(input: object) -> str | None:
    """Why modules have to be called one by one in a call with ``input``, whatever they are; or None."""
    if type(input) not in (Tensor, nn.Parameter):
        return f"expected a plain tensor, got {type(input).__name__}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the call is being traced"
    if torch._C._are_functorch_transforms_active():
        return "the call is being transformed"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    return None

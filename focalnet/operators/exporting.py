"""Whether torch.export is at work, in a form that every supported torch can trace."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, also where torch.compile traces the call.

    There, torch 2.10 and 2.11 answer True whether or not the program is exported; later versions read this flag.
    """
    return torch.compiler._is_exporting_flag

"""What autocast asks of the operators, in a form that every supported torch can trace."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on devices of this type; None if it is off or there is none."""
    return torch.get_autocast_dtype(device_type) if _is_enabled(device_type) else None


def _is_enabled(device_type: str) -> bool:
    # torch 2.10 and 2.11 cannot trace is_autocast_available, so a traced call asks for the name instead.
    if torch.compiler.is_compiling():
        return device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

"""Opt-in autotuning: the table's candidates timed on the call at hand, the choice kept on disk.

With FOCALNET_AUTOTUNE=1 the first call of a kind runs every candidate; the fastest is written to
``$FOCALNET_CACHE_DIR/triton.json`` (by default in ``focalnet`` below $XDG_CACHE_HOME or ~/.cache) and taken from there
ever after, on the same device with the same versions. Without it nothing is timed and nothing is read: the table
decides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from .launch_table import LevelConfig, level_candidates
from .plan import Case

_ENVIRONMENT_VARIABLE = "FOCALNET_AUTOTUNE"


def enabled() -> bool:
    """Whether the environment asks for autotuning."""
    return os.environ.get(_ENVIRONMENT_VARIABLE) == "1"


def cache_file() -> Path:
    """Where choices are kept."""
    if folder := os.environ.get("FOCALNET_CACHE_DIR"):
        return Path(folder, "triton.json")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "focalnet", "triton.json")


def choose(operator: str, case: Case, device_name: str, seconds: Callable[[LevelConfig], float]) -> LevelConfig:
    """The fastest configuration for ``case``: from the cache, or by timing each candidate with ``seconds``.

    A candidate that cannot run (too many registers, say) counts as infinitely slow.
    """
    key = f"{operator} {case} {device_name} triton {triton.__version__} torch {torch.__version__}"
    known = _read()
    if key not in known:
        candidates = level_candidates(case.height, case.width, case.channels, case.kernel_heights, case.dtype)
        best = min(candidates, key=lambda config: _seconds_or_never(seconds, config))
        # Read again: another process may have written meanwhile.
        known = _read() | {key: asdict(best)}
        _write(known)
    return LevelConfig(**known[key])


def _seconds_or_never(seconds: Callable[[LevelConfig], float], config: LevelConfig) -> float:
    try:
        return seconds(config)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _read() -> dict[str, dict]:
    try:
        return json.loads(cache_file().read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(known: dict[str, dict]) -> None:
    """By a rename, so that no reader sees half a file."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    draft.replace(file)

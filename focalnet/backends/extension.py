"""Loads the compiled extension, focalnet._C. If it is missing, `missing` returns the exact reason.

An extension that was never built is normal: the package runs without it. An extension that was built and does not load
is a broken installation. The package stays usable in both cases, and the reason distinguishes them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported before the extension, which links libtorch: importing torch loads that library.
import torch

__all__ = ["build_info", "cpu_capabilities", "cuda_missing", "missing"]

NAME = "focalnet._C"
PACKAGE = Path(__file__).resolve().parents[1]
REBUILD = (
    "run `FOCALNET_BUILD=cpu pip install --no-build-isolation --no-deps --force-reinstall .` in focalnet's sources, "
    "with torch, setuptools, ninja and a C++20 compiler installed"
)


def recorded_build(package: Path = PACKAGE) -> dict[str, Any]:
    """The record that setup.py wrote when it built this package; {} if setup.py did not build it."""
    path = package / "_build_info.json"
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return {"reason": f"{path} cannot be read: {error}"}
    return recorded if isinstance(recorded, dict) else {}


def why_absent(package: Path = PACKAGE) -> str:
    """Why this interpreter finds no extension to load."""
    others = sorted(path.name for pattern in ("_C.*so", "_C*.pyd") for path in package.glob(pattern))
    if others:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        return (
            f"the compiled extension {NAME} was built for another Python: found {', '.join(others)}, "
            f"this interpreter loads _C{suffix}; to build it for this one, {REBUILD}"
        )
    recorded = recorded_build(package)
    if recorded.get("built"):
        cause = "it was built, but its file is gone"
    else:
        cause = recorded.get("reason") or "these sources were never built or installed"
    return f"the compiled extension {NAME} was not built: {cause}; to build it, {REBUILD}"


def load() -> tuple[ModuleType | None, str | None]:
    """Load the extension. Returns it and None, or None and the reason why it is missing."""
    # Search this folder only: importlib.util.find_spec would also find that of an editable install elsewhere.
    if importlib.machinery.PathFinder.find_spec(NAME, [str(PACKAGE)]) is None:
        return None, why_absent()
    try:
        return importlib.import_module(NAME), None
    except ImportError as error:
        built_with = recorded_build().get("torch")
        versions = f" (built with torch {built_with}, running torch {torch.__version__})" if built_with else ""
        broken = f"the compiled extension {NAME} was built but does not load{versions}: {error}"
        return None, f"{broken}; to build it anew, {REBUILD}"


_module, _missing = load()
_warned = False


def missing() -> str | None:
    """None if the extension is loaded, else the reason with instructions."""
    return _missing


def warn_if_missing() -> None:
    """Warn once per process that a call would have used the extension. Kernels from the hub never have one."""
    global _warned
    if _missing is None or _warned or not __name__.startswith("focalnet."):
        return
    _warned = True
    message = (
        f"focalnet runs without its compiled CPU kernels: {_missing}. Until then it uses PyTorch's own operators, and "
        f"a model takes up to twice as long on a CPU. If that is intended, set FOCALNET_BACKEND=reference to silence "
        f"this warning."
    )
    warnings.warn(message, UserWarning, stacklevel=2)


def cuda_missing() -> str | None:
    """None if the extension is loaded and contains the CUDA kernels, else the reason with instructions."""
    if _missing is not None:
        return _missing
    if hasattr(torch.ops.focalnet, "cuda_takes_planar_maps"):
        return None
    cause = recorded_build().get("cuda", {}).get("reason") or "it was built by a version that had none"
    return (
        f"the compiled extension {NAME} has no CUDA kernels: {cause}; to build them, "
        f"{REBUILD.replace('FOCALNET_BUILD=cpu', 'FOCALNET_BUILD=cuda')} and the CUDA toolkit's nvcc"
    )


def build_info() -> dict[str, Any]:
    """Compiler, C++ standard, torch versions and instruction sets of the extension; {} if it is missing."""
    return _module.build_info() if _module is not None else {}


def structure() -> Any:
    """The class of csrc/structure.h. Raises AttributeError if the extension is missing."""
    extension: Any = _module
    return extension.Structure


def cpu_capabilities() -> dict[str, bool]:
    """Whether this machine has each instruction set, named as in Linux's /proc/cpuinfo; {} without the extension."""
    return _module.cpu_capabilities() if _module is not None else {}

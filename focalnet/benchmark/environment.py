"""The facts that every result row records: device, versions and commit."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

from .._version import __version__
from . import processor

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "timm", "onnxruntime", "openvino")


def facts(kind: str = "cpu") -> dict[str, object]:
    """Device, versions and commit for a result row; ``kind`` is "cpu" or "cuda"."""
    common = {"device": device(kind), "commit": commit(), **versions()}
    return common | (_gpu_facts() if kind == "cuda" else _cpu_facts())


def device(kind: str = "cpu") -> str:
    """The device's name in results: that of the GPU, or of the processor with family, instruction set and cores."""
    return _gpu_name() if kind == "cuda" else str(processor.here())


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _gpu_facts() -> dict[str, object]:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {"driver": driver.stdout.split("\n")[0].strip() if driver else None, "cuda": torch.version.cuda}


def _cpu_facts() -> dict[str, object]:
    found = processor.here()
    return {"processor": found.row(), "threads": found.cores}


def versions() -> dict[str, str]:
    found = {"focalnet": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit, followed by "+" if the tree has changes; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":!bench/results"], capture_output=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")

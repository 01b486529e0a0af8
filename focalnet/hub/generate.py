"""Generates a repository for huggingface's `kernels` from this package: build.toml, torch-ext/ and build/.

    python -m focalnet.hub.generate FOLDER

The kernel does not depend on an architecture: it has Triton and plain PyTorch and no compiled code. Only the sources
that `layers` imports are copied. A kernel may be loaded from any path, together with other versions of itself and an
installed focalnet. Its operators therefore get their own namespace, derived from a hash of the sources.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "focalnet"
VERSION = 1  # version of the layers' interface on the hub
BACKENDS = ("cpu", "cuda")
ENTRY = "hub/layers.py"
INIT = '''"""FocalNet's operators and layers. https://huggingface.co/docs/kernels says how to load them."""

from . import layers
from .functional import focal_modulation, gated_aggregation

__all__ = ["focal_modulation", "gated_aggregation", "layers"]
'''
LAYERS = """from .hub.layers import FocalNetModulation

__all__ = ["FocalNetModulation"]
"""
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
license = "MIT"
backends = {json.dumps(BACKENDS)}

[torch-noarch]

[kernel]
"""


def needed_sources() -> dict[str, str]:
    """The sources that the layers import, directly or indirectly: path in the package -> source."""
    sources: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        path = waiting.pop()
        # In a checkout, focalnet.kernels is the folder beside the package.
        file = next((root / path for root in (PACKAGE, PACKAGE.parent) if (root / path).is_file()), None)
        if path in sources or file is None:
            continue
        sources[path] = file.read_text()
        waiting += _imported_files(path, sources[path])
    return sources


def _imported_files(path: str, source: str) -> list[str]:
    """The files to which relative imports in ``source`` may refer."""
    files = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = Path(path).parents[node.level - 1].as_posix()
            base = "/".join([*([] if folder == "." else [folder]), *(node.module or "").split(".")]).strip("/")
            files += [f"{base}.py"] if node.module else []
            files += [f"{base}/{alias.name}.py".lstrip("/") for alias in node.names]
    return files


def generate(folder: Path) -> Path:
    """Write the repository to ``folder``, replacing that of an earlier run. Returns the folder."""
    sources = needed_sources()
    revision = hashlib.sha256("".join(path + sources[path] for path in sorted(sources)).encode()).hexdigest()[:8]
    _write_package(folder / "torch-ext" / NAME, sources, f"_{NAME}_{revision}")
    for backend in BACKENDS:
        variant, kernel_id = folder / "build" / f"torch-{backend}", f"_{NAME}_{backend}_{revision}"
        _write_package(variant, sources, kernel_id)
        metadata = {"id": kernel_id, "name": NAME, "version": VERSION, "license": "MIT", "python-depends": []}
        metadata["backend"] = {"type": backend}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / "build.toml").write_text(BUILD)
    return folder


def _write_package(folder: Path, sources: dict[str, str], namespace: str) -> None:
    files = {"__init__.py": INIT, "layers.py": LAYERS}
    for path, source in sources.items():
        renamed = source.replace(f"{NAME}::", f"{namespace}::")
        files[path] = renamed.replace(f"torch.ops.{NAME}.", f"torch.ops.{namespace}.")
    # Subpackages get empty __init__ files, because their original content is not needed here.
    packages = {parent.as_posix() for path in files for parent in Path(path).parents if parent != Path(".")}
    files |= {f"{package}/__init__.py": "" for package in packages}
    shutil.rmtree(folder, ignore_errors=True)
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m focalnet.hub.generate FOLDER")
    print(f"wrote {generate(Path(sys.argv[1]))}")

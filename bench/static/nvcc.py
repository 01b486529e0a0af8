"""A CUDA source as nvcc compiles it for an architecture, without a GPU: PTX, cubin, and what ptxas reports."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from compile_cache import made_once
from included_files import with_included

FLAGS = ("-O3", "-std=c++20", "-Xptxas=-v")


def code(source: Path, architecture: int, nvcc: str = "nvcc") -> Path:
    """The folder of code.ptx, code.cubin and ptxas.txt of a source, compiled once for all processes.

    Raises:
        RuntimeError: nvcc does not compile it; the message is nvcc's.
    """
    texts = [path.read_bytes() for path in with_included([source])]

    def make(folder: Path) -> None:
        ptx, cubin = folder / "code.ptx", folder / "code.cubin"
        target = f"-arch=sm_{architecture}"
        # From PTX to a cubin, not from the source again: nvcc would name what is in no namespace anew.
        for kind, given, path in (("--ptx", source, ptx), ("--cubin", ptx, cubin)):
            ended = subprocess.run(
                [nvcc, *FLAGS, target, kind, str(given), "-o", str(path)], capture_output=True, text=True, check=False
            )
            if ended.returncode:
                raise RuntimeError(f"{source} for sm_{architecture}: {ended.stderr}")
        (folder / "ptxas.txt").write_text(ended.stderr)

    return made_once(["nvcc", version(nvcc), *FLAGS, str(architecture), *texts], make)


@functools.cache
def version(nvcc: str = "nvcc") -> str:
    """What nvcc says of its own version."""
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

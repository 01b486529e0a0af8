"""The machine code of csrc/cuda's kernels, counted as performance_model.py counts that of Triton's.

    python bench/static/cuda_code.py csrc/cuda/gated_aggregation_fwd.cu --architecture 90

nvcc compiles a source to PTX and to a cubin. The command lists each kernel's instructions by pipe, its loops, and what
one trip of a loop holds. `compiled` gives what `instruction_counts.Kernel` runs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from assembly import Code, code_of
from compile_cache import made_once
from compiled import tool
from included_files import with_included
from loops import Loop, loops
from machine_code import pipe
from ptxas import FLAGS, kernel_name
from rich.console import Console
from rich.table import Table

PIPES = ("fma", "alu", "memory", "special", "tensor", "control", "constant", "uniform")
console = Console(width=150)


def compiled(source: Path, architecture: int, nvcc: str = "nvcc") -> tuple[str, str, bytes]:
    """(PTX, disassembly, cubin) of a source.

    Raises:
        RuntimeError: nvcc does not compile it; the message is nvcc's.
    """
    texts = [path.read_bytes() for path in with_included([source])]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

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
        shown = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
        (folder / "code.sass").write_text(shown.stdout)

    folder = made_once([version, *FLAGS, str(architecture), *texts], make)
    texts = ((folder / name).read_text() for name in ("code.ptx", "code.sass"))
    return (*texts, (folder / "code.cubin").read_bytes())


def names(ptx: str) -> list[str]:
    """The kernels of a PTX, as the linker calls them."""
    return re.findall(r"\.entry\s+(\w+)\s*\(", ptx)


def pipes(code: Code, loop: Loop) -> Counter[str]:
    """Instructions of one trip of a loop, without the loops inside, by pipe."""
    return Counter(pipe(one) for block in loop.own for one in code.blocks[block].instructions)


def main(
    source: Annotated[Path, typer.Argument(help="A .cu file.")],
    architecture: Annotated[int, typer.Option(help="Compute capability, as 90.")] = 90,
    nvcc: Annotated[str, typer.Option(envvar="NVCC")] = "nvcc",
) -> None:
    """Print a table of each kernel's loops."""
    ptx, disassembly, _ = compiled(source, architecture, nvcc)
    for name in names(ptx):
        code = code_of(disassembly, name)
        table = Table("loop", "instructions", *PIPES, title=f"{kernel_name(name)}, sm_{architecture}")
        _add(table, code, loops([block.next for block in code.blocks]), 0)
        console.print(table)


def _add(table: Table, code: Code, loop: Loop, depth: int) -> None:
    counts = pipes(code, loop)
    name = "outside" if loop.header < 0 else f"{'  ' * depth}at block {loop.header}"
    table.add_row(name, str(sum(counts.values())), *(str(counts[pipe]) for pipe in PIPES))
    for inner in loop.inner:
        _add(table, code, inner, depth + 1)


if __name__ == "__main__":
    typer.run(main)

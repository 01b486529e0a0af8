"""Registers, spills and static shared memory of every CUDA kernel on every architecture, as ptxas reports them.

    python bench/static/ptxas.py            compiles the sources that have changed since their rows

It needs nvcc and no GPU. The rows go to bench/results/without-gpu/ptxas.csv; those of a source carry the digest of its
text and of what it includes, and tests/cuda/test_registers.py holds them to it. The dynamic shared memory of a launch
is chosen at run time; tests/cuda/test_cuda_plans.py checks that it fits the device.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from compile_cache import longest_first
from included_files import digest
from nvcc import code, version
from rich.console import Console
from rich.progress import track
from rich.table import Table

from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.rows import NOWHERE, read, write_table

FILE = "ptxas"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FIELDS = (
    *("source", "kernel", "architecture", "registers", "stack", "spill_stores", "spill_loads", "static_shared"),
    *("nvcc", "digest"),
)
TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32"}


def main(nvcc: Annotated[str, typer.Option(envvar="NVCC")] = "nvcc") -> None:
    """Print what the kernels use, and keep it."""
    release = release_of(nvcc)
    kept = [row for row in rows() if is_fresh(row) and row["nvcc"] == release]
    have = {(row["source"], row["architecture"]) for row in kept}
    jobs = [(path, n) for path in longest_first(SOURCES) for n in ARCHITECTURES if (path.stem, f"sm_{n}") not in have]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda job: rows_of(*job, release, nvcc), jobs)
        found = [row for several in track(made, "compiling", len(jobs)) for row in several]
    every = sorted([*kept, *found], key=lambda row: (row["source"], int(row["architecture"][3:]), row["kernel"]))
    path = write_table(every, FILE, NOWHERE, FIELDS)
    Console(width=120).print(table(every))
    print(path.relative_to(ROOT))


def rows() -> list[dict[str, object]]:
    return read(FILE, NOWHERE)


def is_fresh(row: dict[str, object]) -> bool:
    """Whether a row is of its source as it is."""
    path = ROOT / "csrc" / "cuda" / f"{row['source']}.cu"
    return path.exists() and row["digest"] == digest([path])


def rows_of(source: Path, architecture: int, release: str, nvcc: str = "nvcc") -> list[dict[str, object]]:
    facts = {"nvcc": release, "digest": digest([source])}
    found = kernels((code(source, architecture, nvcc) / "ptxas.txt").read_text())
    return [{"source": source.stem, **row, **facts} for row in found]


def release_of(nvcc: str = "nvcc") -> str:
    return re.search(r"release ([\d.]+)", version(nvcc))[1]


def kernels(log: str) -> list[dict[str, object]]:
    """The kernels that ptxas reports in what nvcc printed."""
    rows = []
    for entry in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)
        rows.append(
            {
                "kernel": kernel_name(name),
                "architecture": architecture,
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "stack": int(stack),
                "spill_stores": int(stores),
                "spill_loads": int(loads),
                "static_shared": int(shared[1]) if shared else 0,
            }
        )
    return rows


def kernel_name(mangled: str) -> str:
    """``dgates_kernel<float16, 4>`` from the compiler's name for it, with all its template arguments."""
    name, rest = re.search(r"\d([a-z_]+_kernel)(.*)", mangled).groups()
    arguments = re.match(r"I(6__half|13__nv_bfloat16|f)((?:L[ib]\d+E)*)", rest)
    if arguments is None:
        return name
    numbers = re.findall(r"L[ib](\d+)E", arguments[2])
    return f"{name}<{', '.join([TYPES[arguments[1]], *numbers])}>"


def table(rows: list[dict[str, object]]) -> Table:
    """A line for each kernel: registers on each architecture, and the most of everything else."""
    architectures = sorted({row["architecture"] for row in rows}, key=lambda name: int(name[3:]))
    shown = Table("kernel", *architectures, "stack", "spills", "static shared")
    for kernel in sorted({row["kernel"] for row in rows}):
        mine = {row["architecture"]: row for row in rows if row["kernel"] == kernel}
        most = {name: max(row[name] for row in mine.values()) for name in ("stack", "spill_stores", "static_shared")}
        shown.add_row(kernel, *(str(mine[a]["registers"]) for a in architectures), *map(str, most.values()))
    return shown


if __name__ == "__main__":
    typer.run(main)

"""Reports registers, spills and static shared memory of every CUDA kernel on every architecture, from ptxas.

    python bench/static/ptxas.py [--architecture 90]
    NVCC_APPEND_FLAGS=-Xptxas=-v FOCALNET_BUILD=cuda pip install -v --no-build-isolation . > build.log
    python bench/static/ptxas.py --log build.log

With --log it reads the output of an earlier build instead of compiling again. It needs nvcc and no GPU. The rows go to
bench/results/nvcc-<release>/ptxas.json. The dynamic shared memory of a launch is chosen at run time;
tests/cuda/test_cuda_plans.py checks that it fits the device.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from nvcc import FLAGS
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import ROOT, commit, versions
from focalnet.benchmark.rows import write

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32"}


def main(
    architecture: Annotated[list[int] | None, typer.Option(help="Compute capability, as 90.")] = None,
    log: Annotated[Path | None, typer.Option(help="What a build printed with -Xptxas=-v.")] = None,
    nvcc: Annotated[str, typer.Option(envvar="NVCC")] = "nvcc",
) -> None:
    """Compile csrc/cuda for each architecture and print what the kernels use."""
    release = re.search(r"release ([\d.]+)", _run(nvcc, "--version"))[1]
    found = kernels(log.read_text() if log else compile_all(nvcc, architecture or ARCHITECTURES))
    facts = {"nvcc": release, "commit": commit(), **versions()}
    rows = [{"case": f"{row['kernel']} {row['architecture']}", **row, **facts} for row in found]
    path = write(rows, "ptxas", f"nvcc {release}")
    Console(width=120).print(table(found))
    print(path.relative_to(ROOT))


def compile_all(nvcc: str, architectures: Sequence[int]) -> str:
    """What nvcc prints when it compiles every source for every architecture."""
    jobs = [(path, number) for number in architectures for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return "".join(pool.map(lambda job: compile_one(nvcc, *job), jobs))


def compile_one(nvcc: str, source: Path, architecture: int) -> str:
    """What nvcc prints when it compiles ``source`` for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        return _run(nvcc, *FLAGS, target, "-c", str(source), "-o", str(Path(folder, "kernels.o")))


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


def _run(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    typer.run(main)

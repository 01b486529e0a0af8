"""Predicts the time of csrc/cuda's launches, as performance_model.py predicts that of Triton's.

    python bench/static/cuda_model.py [--variant tiny_lrf] [--batch 128] [--device H100]

The program of the tests (tests/cuda/cuda_on_cpu) prints the launches of a call with their arguments; nvcc compiles the
kernels for the device; `instruction_counts` runs the PTX's integer arithmetic on the arguments of some blocks and
counts machine code. Bytes through the L2 are those that the kernels' headers name, by sectors of 32 bytes.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from cuda_code import compiled, kernel, names
from instruction_counts import Kernel
from launch_bytes import Bytes
from machine_code import load_cycles
from performance_model import GAP, SAMPLE, Predicted, Total, predict
from processors import PROCESSORS, Processor
from ptxas import kernel_name
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.floors import Stage, stages

sys.path.append(str(ROOT / "tests" / "helpers"))
import cuda_program  # noqa: E402

SHARED = {"A100": (163, 164), "RTX 4090": (99, 100), "H100": (227, 228), "B200": (227, 228)}
console = Console(width=160)


@dataclass(frozen=True)
class Launch:
    """``name`` as in ptxas.py's table; ``arguments``: bytes of each parameter."""

    name: str
    grid: int
    threads: int
    shared: int
    arguments: tuple[bytes, ...]


@functools.cache
def program() -> Path:
    folder = Path(tempfile.gettempdir(), f"focalnet-cuda-model-{os.getpid()}")
    if "KEEP" in os.environ and (Path(os.environ["KEEP"]) / "kernels").exists(): return Path(os.environ["KEEP"]) / "kernels"
    if "KEEP" in os.environ: folder = Path(os.environ["KEEP"])
    folder.mkdir(exist_ok=True)
    return cuda_program.compile_sources(folder)


@functools.cache
def _symbols() -> dict[int, str]:
    """Kernels of the program by their distance from cuda_on_cpu_switch."""
    listed = subprocess.run(["nm", str(program())], capture_output=True, text=True, check=True).stdout
    found = {line.split()[-1]: int(line.split()[0], 16) for line in listed.splitlines() if len(line.split()) == 3}
    anchor = found["cuda_on_cpu_switch"]
    return {
        place - anchor: kernel_name(symbol)
        for symbol, place in found.items()
        if re.search(r"^_ZN8focalnet4cuda\w*\d[a-z_]+_kernel(I|E)", symbol)
    }


def launches(stage: Stage, batch: int, dtype: torch.dtype, processor: Processor, backward: bool) -> list[Launch]:
    """Of gated_aggregation on tensor cores, or of its gradients with agg again."""
    levels = len(stage.kernels)
    numbers = [int(backward), 0, cuda_program.ELEMENTS[dtype], batch, stage.height, stage.width, stage.channels]
    numbers += [levels, 0, int(dtype != torch.float32)]
    numbers += [1024 * size for size in SHARED[processor.name]] + [processor.device.sm_count] + [0] * 15
    numbers += [size for one in stage.kernels for size in (one, one)] + [1, 1, 1, 1]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cuda_program.case(numbers))
        lines = cuda_program.run([str(program()), file.name, "-", "launches"]).splitlines()
    found = []
    for line in lines:
        place, grid, threads, shared, *arguments = line.split()
        name = _symbols()[int(place)]
        found.append(Launch(name, int(grid), int(threads), int(shared), tuple(map(bytes.fromhex, arguments))))
    return found


@functools.cache
def _kernels(source: Path, arch: int) -> dict[str, tuple[Kernel, int]]:
    """(kernel, registers) of a source, by name."""
    ptx, shown = compiled(source, arch)
    return {kernel_name(name): (kernel(ptx, shown, name), _registers(shown, name)) for name in names(ptx)}


def _kernel(name: str, arch: int) -> tuple[Kernel, int]:
    base = name.split("<")[0]
    source = next(
        path for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if re.search(rf"(?m)\bvoid\b.*\n?.*\b{base}\(", path.read_text())
    )
    return _kernels(source, arch)[name]


def _registers(disassembly: str, name: str) -> int:
    """The highest register that a kernel names, and one."""
    section = re.search(rf"^//-+ \.text\.{name}\s+-+$(.*?)(?=^//-+ \.|\Z)", disassembly, re.M | re.S)[1]
    return 1 + max(map(int, re.findall(r"\bR(\d+)\b", section)))


def _arguments(found: Kernel, launch: Launch) -> dict[str, int]:
    values = {}
    for (name, _), data in zip(found.ptx.parameters, launch.arguments, strict=True):
        for size in (1, 2, 4, 8):
            for place in range(0, len(data) - size + 1, size):
                values[f"{name}+{place}.{8 * size}"] = int.from_bytes(data[place : place + size], "little")
    return values


def predict_launch(launch: Launch, processor: Processor, moved: Bytes) -> Predicted:
    found, registers = _kernel(launch.name, processor.device.arch)
    arguments = _arguments(found, launch)
    sample = sorted({round(i * (launch.grid - 1) / max(1, SAMPLE - 1)) for i in range(SAMPLE)})
    executed = [
        found.executed(
            arguments, (one, 0, 0), (launch.grid, 1, 1), launch.threads,
            warps=range(-(-launch.threads // 32)), load=load_cycles(in_l2=1),
        )
        for one in sample
    ]  # fmt: skip
    used = _Used(launch.name, registers, launch.shared, launch.threads)
    return predict(processor, used, executed, launch.grid, moved), executed


@dataclass(frozen=True)
class _Used:
    kernel: str
    registers: int
    shared: int
    threads: int


def main(
    variant: Annotated[str, typer.Option()] = "tiny_lrf",
    device: Annotated[str, typer.Option()] = "H100",
    batch: Annotated[int, typer.Option()] = 128,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    stage: Annotated[list[int] | None, typer.Option()] = None,
) -> None:
    """Print a table."""
    table = Table("stage", "kernel", *("us bound programs a_SM waves regs shared instr/output floats ptx by".split()))
    for one in stages(variant):
        if stage and one.index + 1 not in stage:
            continue
        outputs = batch * one.height * one.width * one.channels
        for backward in (False, True):
            total = 0.0
            for launch in launches(one, batch, getattr(torch, dtype), PROCESSORS[device], backward):
                p, executed = predict_launch(launch, PROCESSORS[device], Bytes(0, 0))
                total += p.seconds + GAP
                table.add_row(
                    str(one.index + 1), launch.name, f"{1e6 * p.seconds:.1f}", p.bound, str(p.programs),
                    str(p.programs_per_sm), str(p.waves), str(p.registers), str(p.shared),
                    f"{32 * p.instructions / outputs:.1f}", f"{executed[0].floats:.0f}", f"{executed[0].floats_of_ptx:.0f}",
                    " ".join(f"{k}={1e6 * v:.0f}" for k, v in p.by.items()),
                )  # fmt: skip
            table.add_row(str(one.index + 1), "backward" if backward else "forward", f"{1e6 * total:.1f}", style="bold")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

"""Predicts the time of csrc/cuda's launches, as performance_model.py predicts that of Triton's.

    python bench/static/cuda_model.py                   all that is covered: some ten minutes of two processors at most
    python bench/static/cuda_model.py --variant tiny_lrf --device H100 --batch 128 --dtype bfloat16 --dry

The program of the tests (tests/cuda/cuda_on_cpu) prints the launches of a call with their arguments; nvcc compiles the
kernels for the device; `instruction_counts` runs the machine code on the arguments, for every warp of some programs.
Bytes of the L2 are the sectors that a program asks for, bytes of memory those that the kernels' headers name. It needs
nvcc and g++, and no GPU. Rows: bench/results/without-gpu/predicted_cuda.json; the operators are the aggregation and
its gradients, with agg once more. compile_cache.py keeps what was compiled. No figure is measured.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
import warp
from assembly import section
from compile_cache import made_once
from constants import constants
from cuda_code import compiled, names
from instruction_counts import Executed, Kernel
from launch_bytes import Bytes
from parameters import layout, packed
from performance_model import SAMPLE, Predicted, microseconds, predict, sample_of
from processors import GAP, PROCESSORS, Processor
from ptxas import kernel_name
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import ROOT, versions
from focalnet.benchmark.floors import Stage, stages
from focalnet.benchmark.rows import NOWHERE, keep_only, key, read, write

sys.path.append(str(ROOT / "tests" / "helpers"))
import cuda_program

FILE = "predicted_cuda"
SOURCES = [path for ending in ("cu", "cuh", "h", "cpp") for path in sorted(ROOT.glob(f"csrc/cuda/*.{ending}"))]
Case = tuple[str, str, str, int]  # variant, device, dtype, batch
COVERED: tuple[Case, ...] = (
    *itertools.product(("tiny_lrf",), ("H100",), ("bfloat16",), (1, 8, 128)),
    *itertools.product(("tiny_lrf",), ("A100", "RTX 4090", "B200"), ("bfloat16",), (128,)),
    *itertools.product(("tiny_lrf",), ("H100",), ("float16", "float32"), (128,)),
    ("large_fl3", "H100", "bfloat16", 32),
)
console = Console(width=180)


@dataclass(frozen=True)
class Launch:
    """``name`` as in ptxas.py's table; ``arguments``: the bytes of each parameter; ``memory``: where tensors lie."""

    name: str
    grid: int
    threads: int
    shared: int
    arguments: tuple[bytes, ...]
    memory: range

    @property
    def kernel(self) -> str:
        return self.name.split("<")[0]


@dataclass(frozen=True)
class Call:
    """An aggregation, or its gradients."""

    stage: Stage
    batch: int
    dtype: torch.dtype
    processor: Processor
    backward: bool

    @property
    def outputs(self) -> int:
        return self.batch * self.stage.height * self.stage.width * self.stage.channels

    def case(self) -> bytes:
        """As tests/cuda/cuda_on_cpu/main.cpp reads it, without tensors."""
        one, gpu = self.stage, self.processor
        numbers = [int(self.backward), 0, cuda_program.ELEMENTS[self.dtype], self.batch]
        numbers += [one.height, one.width, one.channels, one.levels, 0, int(self.dtype != torch.float32)]
        # Shared memory that a block may have, and that a multiprocessor has.
        numbers += [gpu.device.shared_bytes, gpu.shared_bytes, gpu.device.sm_count] + [0] * 15
        numbers += [size for kernel in one.kernels for size in (kernel, kernel)]
        numbers += [1, 1, 1, 1]
        return cuda_program.case(numbers)


@functools.cache
def program() -> Path:
    texts = [
        path.read_bytes() for path in (*SOURCES, *sorted((cuda_program.TESTS / "cuda" / "cuda_on_cpu").iterdir()))
    ]
    return made_once([cuda_program.FLAGS, *texts], cuda_program.compile_sources) / "kernels"


@functools.lru_cache(64)
def _lines(call: Call, *more: str) -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(call.case())
        return cuda_program.run([str(program()), file.name, *more]).splitlines()


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


def launches(call: Call) -> list[Launch]:
    """In order, for contiguous maps and the padded projection."""
    found = []
    head, *lines = _lines(call, "-", "launches")
    first, size = map(int, head.split())
    memory = range(first, first + size + 1)
    for line in lines:
        place, grid, threads, shared, *arguments = line.split()
        name = _symbols()[int(place)]
        found.append(Launch(name, int(grid), int(threads), int(shared), tuple(map(bytes.fromhex, arguments)), memory))
    return found


@dataclass(frozen=True)
class Compiled:
    """A kernel to run, its registers, and (offset, bytes) of its parameters."""

    kernel: Kernel
    registers: int
    parameters: list[tuple[int, int]]


@functools.cache
def texts_of(source: Path, arch: int) -> tuple[str, str, bytes, dict[str, str]]:
    """(PTX, disassembly, cubin, symbols of the kernels by name) of a source."""
    ptx, shown, cubin = compiled(source, arch)
    return ptx, shown, cubin, {kernel_name(symbol): symbol for symbol in names(ptx)}


def source_of(name: str) -> Path:
    """The file that defines a kernel."""
    defines = re.compile(rf"__global__[^;{{]*\b{name.split('<')[0]}\(")
    return next(path for path in SOURCES if path.suffix == ".cu" and defines.search(path.read_text()))


@functools.cache
def _compiled(name: str, arch: int) -> Compiled:
    ptx, shown, cubin, symbols = texts_of(source_of(name), arch)
    symbol = symbols[name]
    return Compiled(
        Kernel(shown, arch, symbol, constants(cubin, symbol)), _registers(shown, symbol), layout(ptx, symbol)
    )


def _registers(disassembly: str, name: str) -> int:
    """One more than the highest register that a kernel names."""
    return 1 + max(map(int, re.findall(r"\bR(\d+)\b", section(disassembly, name).split("\n//-")[0])))


def moved(launch: Launch, call: Call, sectors: float, requested: float) -> Bytes:
    """Of a launch whose programs ask for so many different ``sectors`` each, on average, in so many ``requested``.

    Every request goes to the L2: shared memory leaves the L1 next to nothing.
    Memory is asked once for what several programs share: passes over maps, channels last or planar, and over dgates of
    every block of channels. A kernel that is not listed shares nothing.
    """
    asked = 32 * sectors * launch.grid
    levels, plane = call.stage.levels, 2 * call.outputs
    cuts = [line.split() for line in _lines(call)[2:]]
    block_c = int(next(cut for cut in cuts if cut[0] == ("backward" if call.backward else "forward"))[1])
    gates = plane // call.stage.channels
    dgates = 2 * gates * -(-call.stage.channels // block_c)
    last, planar, others = {
        "toeplitz_fwd_kernel": (2, levels * call.backward, gates * (levels + 1)),
        "toeplitz_fwd_planes_kernel": (2, 0, gates * (levels + 1)),
        "toeplitz_bwd_kernel": (5, 0, dgates * (levels + 1)),
        "toeplitz_first_bwd_kernel": (1, 3, 2 * dgates),
        "toeplitz_level_bwd_kernel": (0, 5, dgates),
        "gate_sums_kernel": (1, 0, gates),
        "add_global_kernel": (2, 0, gates),
        "sum_dgates_kernel": (0, 0, (dgates + gates) * (levels + 1)),
    }.get(launch.kernel, (None, 0, 0))
    memory = asked if last is None else min(asked, (last + planar) * plane + others)
    return Bytes(32 * requested * launch.grid, memory)


@dataclass(frozen=True)
class _Used:
    kernel: str
    registers: int
    shared: int
    threads: int


def executed(launch: Launch, arch: int, programs: int = SAMPLE) -> list[Executed]:
    """What some programs of a launch execute."""
    made, grid = _compiled(launch.name, arch), (launch.grid, 1, 1)
    given = warp.Launch(_apart(packed(made.parameters, launch.arguments), launch.memory), grid, launch.threads)
    return [*made.kernel.executed(given, sample_of(grid, programs))]


def _apart(parameters: bytes, memory: range) -> bytes:
    """The parameters with every address in a stretch of its own: the program gives all tensors the same one."""
    words = [parameters[first : first + 8] for first in range(0, len(parameters), 8)]
    for number, word in enumerate(words):
        if int.from_bytes(word, "little") in memory:
            words[number] = (number + 1 << 40).to_bytes(8, "little")
    return b"".join(words)


def predict_launch(launch: Launch, call: Call) -> Predicted:
    arch = call.processor.device.arch
    used = _Used(launch.name, _compiled(launch.name, arch).registers, launch.shared, launch.threads)
    found = executed(launch, arch)
    sectors = sum(one.sectors for one in found) / len(found)
    requested = sum(one.requested_sectors for one in found) / len(found)
    return predict(call.processor, used, found, launch.grid, moved(launch, call, sectors, requested))


def rows_of(call: Call) -> list[dict]:
    """A row for each launch, and one for all of them."""
    head = {
        "case": "predicted",
        "backend": "cuda",
        "operator": "gated_aggregation_bwd" if call.backward else "gated_aggregation",
        "variant": call.stage.variant,
        "stage": call.stage.index + 1,
        "x": call.processor.name,
        "batch": call.batch,
        "dtype": str(call.dtype).removeprefix("torch."),
    }
    found = [predict_launch(launch, call) for launch in launches(call)]
    rows = [
        head
        | {
            "subject": f"{number} {one.kernel}",
            "predicted_us": microseconds(one.seconds),
            "bound": one.bound,
            "programs": one.programs,
            "programs_per_sm": one.programs_per_sm,
            "waves": one.waves,
            "registers": one.registers,
            "shared": one.shared,
            "instructions_per_output": round(32 * one.instructions / call.outputs, 1),
            "us_by": {resource: microseconds(seconds) for resource, seconds in one.by.items()},
        }
        for number, one in enumerate(found, 1)
    ]
    total = {
        "subject": "all",
        "predicted_us": microseconds(sum(one.seconds + GAP for one in found)),
        "launches": len(found),
        "fewest_programs": min(one.programs for one in found),
        "instructions_per_output": round(32 * sum(one.instructions for one in found) / call.outputs, 1),
        "digest": digest(),
    }
    return [head | total, *rows]


def digest() -> str:
    """Changes with the sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


def main(
    variant: Annotated[list[str] | None, typer.Option(help="Published variants.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="A100, RTX 4090, H100, B200.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32.")] = None,
    stage: Annotated[list[int], typer.Option(help="Stages, from 1.")] = [1, 2, 3, 4],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    dry: Annotated[bool, typer.Option(help="Print only.")] = False,
) -> None:
    """Predict, print a table for each call, and write the rows; by default all that is covered."""
    chosen = (variant, device, dtype, batch)
    defaults = (["tiny_lrf"], ["H100"], ["bfloat16"], [128])
    cases = [*itertools.product(*(given or default for given, default in zip(chosen, defaults, strict=True)))]
    # A process keeps what it disassembled: cases of one device and dtype follow each other.
    cases = sorted(cases if any(chosen) else COVERED, key=lambda case: case[1:3])
    program()
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(cases))) as pool:
        for rows_of_case in pool.map(_rows_of_case, cases, itertools.repeat(tuple(stage))):
            for rows in rows_of_case:
                show(rows)
            if not dry:
                _replace([row | versions() for rows in rows_of_case for row in rows])
    if not any(chosen) and not dry:
        _forget_older()


def _replace(rows: list[dict]) -> None:
    """Write ``rows``, and delete those that their calls had before."""
    calls, fresh = {_call_of(row) for row in rows}, {key(row) for row in rows}
    write(rows, FILE, NOWHERE)
    stored = read(FILE, NOWHERE)
    keep_only({key(row) for row in stored if _call_of(row) not in calls or key(row) in fresh}, FILE, NOWHERE)


def _forget_older() -> None:
    """Delete the calls that older sources had rows of and these have not."""
    stored = read(FILE, NOWHERE)
    current = {_call_of(row) for row in stored if row["subject"] == "all" and row["digest"] == digest()}
    keep_only({key(row) for row in stored if _call_of(row) in current}, FILE, NOWHERE)


def _call_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("variant", "x", "batch", "dtype", "operator", "stage"))


def _rows_of_case(case: Case, numbers: tuple[int, ...]) -> list[list[dict]]:
    variant, device, dtype, batch = case
    found = []
    for number, backward in itertools.product(numbers, (False, True)):
        call = Call(stages(variant)[number - 1], batch, getattr(torch, dtype), PROCESSORS[device], backward)
        try:
            found.append(rows_of(call))
        except ValueError as error:
            # Such as a branch that warp.py cannot follow: the other calls have their rows.
            print(f"left out: {variant}, {device}, stage {number}, backward {backward}: {error}", flush=True)
    return found


def show(rows: list[dict]) -> None:
    head = rows[0]
    columns = ["predicted_us", "programs", "programs_per_sm", "waves", "registers", "shared"]
    columns += ["instructions_per_output"]
    table = Table("launch", *columns, "us by resource")
    table.title = f"predicted, not measured: {head['variant']} stage {head['stage']}, {head['operator']}, {head['x']}"
    for row in [*rows[1:], head]:
        by = sorted(row.get("us_by", {}).items(), key=lambda item: -item[1])
        cells = (str(row.get(name, "")) for name in columns)
        table.add_row(row["subject"], *cells, ", ".join(f"{name} {us:.0f}" for name, us in by))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

"""Predicts the time of csrc/cuda's launches, as performance_model.py predicts that of Triton's.

    python bench/static/cuda_model.py                   what has no row of these sources, by use; Ctrl-C keeps the rest
    python bench/static/cuda_model.py --variant tiny_lrf --device H100 --batch 128 --dtype bfloat16 --dry

The program of the tests (tests/cuda/cuda_on_cpu) prints the launches of a call with their arguments; nvcc compiles the
kernels for the device; `instruction_counts` runs the machine code on the arguments, for every warp of some programs.
Bytes of the L2 are the sectors that a program asks for, bytes of memory those that the kernels' headers name. It needs
nvcc and g++, and no GPU. Rows: bench/results/without-gpu/predicted_cuda.csv; predicted_calls.py says of what. The
operators are the aggregation and its gradients, with agg once more. A row's digest is that of the files that its
launches depend on. compile_cache.py keeps what was compiled. No figure is measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import predicted_calls
import torch
import typer
import warp
from assembly import section
from constants import constants
from cuda_code import compiled, names
from included_files import digest
from instruction_counts import Asked, Executed, Kernel
from launch_bytes import Bytes
from machine_code import load_cycles
from parameters import layout, packed
from performance_model import RESOURCES, SAMPLE, Predicted, microseconds, predict, sample_of
from predicted_calls import Group
from processors import GAP, PROCESSORS, Processor
from ptxas import kernel_name
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.floors import Stage, stages

sys.path.append(str(ROOT / "tests" / "helpers"))
import cuda_program

FILE = "predicted_cuda"
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [path for ending in ("cu", "cuh", "h", "cpp") for path in sorted(CUDA.glob(f"*.{ending}"))]
OPERATORS = predicted_calls.OF_FILE[FILE]  # forward, backward
FIELDS = (
    *("backend", "operator", "variant", "stage", "x", "dtype", "batch", "subject", "predicted_us", "launches"),
    *("fewest_programs", "instructions_per_output", "bound", "programs", "programs_per_sm", "waves", "registers"),
    *("shared", *(f"us_{name}" for name in RESOURCES), "digest", "sources"),
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
    return cuda_program.linked()


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


@functools.lru_cache(16)
def texts_of(source: Path, arch: int) -> tuple[str, str, bytes, dict[str, str]]:
    """(PTX, disassembly, cubin, symbols of the kernels by name) of a source."""
    ptx, shown, cubin = compiled(source, arch)
    return ptx, shown, cubin, {kernel_name(symbol): symbol for symbol in names(ptx)}


@functools.cache
def source_of(name: str) -> Path:
    """The file that defines a kernel."""
    defines = re.compile(rf"__global__[^;{{]*\b{name.split('<')[0]}\(")
    return next(path for path in SOURCES if path.suffix == ".cu" and defines.search(path.read_text()))


@functools.lru_cache(64)
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
    made = _compiled(launch.name, arch)
    return [*made.kernel.executed(*_asked(launch, made, programs))]


def _asked(launch: Launch, made: Compiled, programs: int = SAMPLE) -> Asked:
    grid = launch.grid, 1, 1
    given = warp.Launch(_apart(packed(made.parameters, launch.arguments), launch.memory), grid, launch.threads)
    return given, tuple(sample_of(grid, programs)), load_cycles(in_l2=1)


def prepare(calls: Sequence[Call]) -> None:
    """Run the machine code of several calls of a device at once: launches of a kernel run side by side."""
    by_kernel: dict[str, list[Launch]] = {}
    for call in calls:
        for launch in launches(call):
            by_kernel.setdefault(launch.name, []).append(launch)
    for name, its_launches in by_kernel.items():
        made = _compiled(name, calls[0].processor.device.arch)
        with contextlib.suppress(ValueError):  # `rows_of` meets it again, and says of which call
            made.kernel.prepare(_asked(launch, made) for launch in its_launches)


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
    """A row for all launches of a call, and one for each."""
    head = {
        "backend": "cuda",
        "operator": OPERATORS[call.backward],
        "variant": call.stage.variant,
        "stage": call.stage.index + 1,
        "x": call.processor.name,
        "dtype": str(call.dtype).removeprefix("torch."),
        "batch": call.batch,
    }
    its_launches = launches(call)
    found = [predict_launch(launch, call) for launch in its_launches]
    slowest = max(found, key=lambda one: one.seconds)
    sources = sorted({source_of(launch.name).stem for launch in its_launches})
    total = {
        "subject": "all",
        "predicted_us": microseconds(sum(one.seconds + GAP for one in found)),
        "launches": len(found),
        "fewest_programs": min(one.programs for one in found),
        "instructions_per_output": round(32 * sum(one.instructions for one in found) / call.outputs, 1),
        "bound": slowest.bound,
        "digest": digest_of(sources, call.backward, call.dtype),
        "sources": " ".join(sources),
    }
    return [head | total, *(head | _row(number, one, call) for number, one in enumerate(found, 1))]


def _row(number: int, one: Predicted, call: Call) -> dict:
    return {
        "subject": f"{number} {one.kernel}",
        "predicted_us": microseconds(one.seconds),
        "instructions_per_output": round(32 * one.instructions / call.outputs, 1),
        "bound": one.bound,
        "programs": one.programs,
        "programs_per_sm": one.programs_per_sm,
        "waves": one.waves,
        "registers": one.registers,
        "shared": one.shared,
        **{f"us_{resource}": microseconds(one.by[resource]) for resource in RESOURCES},
    }


@functools.cache
def _planners(backward: bool) -> list[Path]:
    return [path for path in sorted(CUDA.glob("*plan*.cpp")) if backward or "bwd" not in path.name]


def digest_of(sources: Sequence[str], backward: bool, dtype: torch.dtype) -> str:
    """Of the files that a call's launches depend on.

    They are the ``sources`` of its kernels, those that choose the kernels, those that plan, and what they include.
    """
    families = ("gated_aggregation",) if dtype == torch.float32 else ("gated_aggregation", "toeplitz")
    choose = [f"{family}_{'bwd' if backward else 'fwd'}" for family in families]
    return _digest(tuple(sorted({*sources, *choose})), backward)


@functools.cache
def _digest(stems: tuple[str, ...], backward: bool) -> str:
    return digest([*(CUDA / f"{stem}.cu" for stem in stems), *_planners(backward)])


def is_current(row: dict) -> bool:
    """Whether the row of a call was predicted from the sources that are here."""
    sources = str(row["sources"]).split()
    if not all((CUDA / f"{stem}.cu").exists() for stem in sources):
        return False
    return row["digest"] == digest_of(sources, row["operator"] == OPERATORS[1], getattr(torch, row["dtype"]))


# ---- the command ----------------------------------------------------------------------------------------------------


def main(
    variant: Annotated[list[str] | None, typer.Option(help="Published variants.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="A100, RTX 4090, H100, B200.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32.")] = None,
    stage: Annotated[list[int], typer.Option(help="Stages, from 1.")] = [1, 2, 3, 4],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    dry: Annotated[bool, typer.Option(help="Print only.")] = False,
) -> None:
    """Predict all that has no row of these sources. With --dry or a choice of calls, print those and write nothing."""
    program()
    if dry or any((variant, device, batch, dtype)):
        chosen = (variant, device, dtype, batch)
        defaults = (["tiny_lrf"], ["H100"], ["bfloat16"], [128])
        _show_calls(itertools.product(*(a or b for a, b in zip(chosen, defaults, strict=True))), stage)
        return
    TABLE.fill(rows_of_group, jobs)


TABLE = predicted_calls.Table(FILE, FIELDS, OPERATORS, is_current)


def rows_of_group(group: Group, its_stages: Sequence[Stage]) -> list[dict]:
    """A row for each call; of the detailed variants one for each launch too."""
    calls = [_call(stage, group.device, group.dtype, group.batch, group.backward) for stage in its_stages]
    prepare(calls)
    rows: list[dict] = []
    for call in calls:
        try:
            rows += predicted_calls.kept(rows_of(call))
        except ValueError as error:  # such as a branch that warp.py cannot follow
            print(f"left out: {group}, {call.stage}: {error}", flush=True)
    return rows


def _call(stage: Stage, device: str, dtype: str, batch: int, backward: bool) -> Call:
    return Call(stage, batch, getattr(torch, dtype), PROCESSORS[device], backward)


def _show_calls(cases: Iterable[tuple[str, str, str, int]], numbers: Sequence[int]) -> None:
    for (variant, device, dtype, batch), number, backward in itertools.product(cases, numbers, (False, True)):
        if number <= len(stages(variant)):
            show(rows_of(_call(stages(variant)[number - 1], device, dtype, batch, backward)))


def show(rows: list[dict]) -> None:
    head = rows[0]
    columns = ["predicted_us", "programs", "programs_per_sm", "waves", "registers", "shared"]
    columns += ["instructions_per_output"]
    table = Table("launch", *columns, "us by resource")
    table.title = f"predicted, not measured: {head['variant']} stage {head['stage']}, {head['operator']}, {head['x']}"
    for row in [*rows[1:], head]:
        by = sorted(((name, row.get(f"us_{name}", 0)) for name in RESOURCES), key=lambda item: -item[1])
        cells = (str(row.get(name, "")) for name in columns)
        table.add_row(row["subject"], *cells, ", ".join(f"{name} {us:.0f}" for name, us in by if us))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

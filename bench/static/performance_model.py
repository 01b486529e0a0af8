"""Predicts the time of every Triton launch on a GPU that is not here, and says what binds it.

    python bench/static/performance_model.py                           what is covered; rows of this source stay
    python bench/static/performance_model.py --variant base_lrf --device H100 --batch 128 --dtype bfloat16

A launch is compiled for the device; `instruction_counts` runs its machine code (warp.py) for some programs. Then

    busy      programs on the busiest multiprocessor: whole waves, and what is left of the last one
    issue     their instructions over four a clock                pipe     those of one pipe over its rate
    l1        their requests over 128 bytes a clock               chain    waves times what a warp alone needs
    l2, dram  bytes of the launch over the bandwidth (launch_bytes.py)

Kernels that hold whole planes have few warps on a multiprocessor and wait at barriers, so the resources take turns
more than they overlap: the time is that of the busiest (processor, L1, L2 or memory) and ``EXPOSED`` of what the
others take, but at least the chain. An operator takes the sum over its launches and ``GAP`` between two of them. The
floor is that of `floors.work`; "inductor >=" is the least that the reference takes under torch.compile
(torch_launches.py). No figure here is measured: every one is a prediction. Rows:
bench/results/without-gpu/predicted.json.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import itertools
import math
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch_launches
import triton
import typer
import warp
from all_launches import arguments_of, key_of
from bytes_moved import case_of, plan_of
from compile_report import source
from compiled import Resources, compile_launch, resources, tool
from constants import constants
from focalnet.kernels.plan import Case, Launch, Plan
from instruction_counts import Executed, Kernel
from launch_bytes import Bytes, bytes_of, ring_bytes
from machine_code import load_cycles
from parameters import layout, packed
from processors import GAP, PROCESSORS, SCHEDULERS, Processor
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.environment import versions
from focalnet.benchmark.floors import OPERATORS, Gpu, Stage, stages, work
from focalnet.benchmark.rows import NOWHERE, read, write
from focalnet.variants import VARIANTS

FILE = "predicted"
PREDICTED = tuple(PROCESSORS)
DTYPES, BATCHES = ("bfloat16", "float16", "float32"), (1, 8, 128)
# (variant, device, dtype, batch) of the committed rows. Others can be asked for; compiling all takes hours. The small
# variants have the stages of the tiny ones.
COVERED = (
    *itertools.product(("tiny_lrf",), ("H100",), ("bfloat16",), BATCHES),
    *itertools.product(("tiny_lrf",), ("A100", "B200"), ("bfloat16",), (128,)),
)
# Programs of a launch that are counted; all do nearly the same, but the last ones of a walk may have one item less.
SAMPLE = 4
# Of the time of the resources that are not the busiest. Fitted to the measured kernels of an H100
# (bench/results/nvidia-h100-80gb-hbm3, profiler and ncu): docs/performance.md has the error of every kernel.
EXPOSED = 0.75
PIPES = ("issue", "fma", "alu", "special", "tensor")

console = Console(width=150)


@dataclass(frozen=True)
class Predicted:
    """Of one launch: seconds that each resource needs, and the figures that they follow from."""

    kernel: str
    programs: int
    programs_per_sm: int
    waves: int
    registers: int
    shared: int
    busy: int
    instructions: float
    by: dict[str, float]

    @property
    def seconds(self) -> float:
        resources = [max(self.by[name] for name in PIPES), *(self.by[name] for name in ("l1", "l2", "dram"))]
        busiest = max(resources)
        return max(busiest + EXPOSED * (sum(resources) - busiest), self.by["chain"])

    @property
    def bound(self) -> str:
        return max(self.by, key=lambda name: self.by[name])


def predict(
    processor: Processor, used: Resources, executed: Sequence[Executed], programs: int, moved: Bytes
) -> Predicted:
    """The time of a launch whose ``programs`` do what those of ``executed`` do."""
    sms = processor.device.sm_count
    resident = processor.programs_per_sm(used.registers, used.shared, used.threads)
    whole, rest = divmod(programs, sms * resident)
    busy, waves = whole * resident + math.ceil(rest / sms), math.ceil(programs / (sms * resident))
    # In one wave the multiprocessor with the longest programs decides, in many the average.
    choose = max if waves == 1 else _mean
    cycles = {
        "issue": busy * choose([one.instructions for one in executed]) / SCHEDULERS,
        "l1": busy * choose([one.wavefronts for one in executed]) / processor.memory,
        "chain": waves * choose([one.chain for one in executed]),
    }
    for pipe in ("fma", "alu", "special"):
        cycles[pipe] = busy * choose([one.pipes.get(pipe, 0) for one in executed]) / processor.rate(pipe)
    matrix = [one.tensor + one.mma / processor.mma for one in executed]
    cycles["tensor"] = busy * choose(matrix) / processor.tensor
    by = {name: value / processor.clock for name, value in cycles.items()}
    by |= {"l2": moved.l2 / processor.l2_bandwidth, "dram": moved.memory / processor.bandwidth}
    total = programs * _mean([one.instructions for one in executed])
    return Predicted(used.kernel, programs, resident, waves, used.registers, used.shared, busy, total, by)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def predict_launch(launch: Launch, plan: Plan, case: Case, processor: Processor) -> Predicted:
    types = plan.dtype_of()
    arch = processor.device.arch
    made = _compiled(_Key(launch, types, arch))
    load = load_cycles(min(1.0, processor.device.on_chip_bytes / max(1, ring_bytes(launch, plan))))
    given = warp.Launch(parameters_of(launch, made.parameters), launch.grid, made.used.threads)
    found = made.kernel.executed(given, sample_of(launch.grid, SAMPLE), load)
    programs = math.prod(launch.grid)
    on_tensor_cores = "PRECISION" in launch.constexprs and case.dtype.itemsize == 2
    if on_tensor_cores and not any(one.tensor or one.mma for one in found):
        # Tensor cores of data center Blackwell: the shape of a product is not in the instruction.
        share = _multiply_adds(launch, case) / programs
        found = [_with_tensor(one, share) for one in found]
    return predict(processor, made.used, found, programs, bytes_of(launch, plan, case, processor.device))


def parameters_of(launch: Launch, places: list[tuple[int, int]]) -> bytes:
    """Numbers as they are; a tensor's address is any that is aligned; what Triton adds is null."""
    values = [0 if value is None else value for value in launch.arguments.values()]
    numbers = [(index + 1) << 32 if isinstance(value, str) else int(value) for index, value in enumerate(values)]
    numbers += [0] * (len(places) - len(numbers))
    sizes = (size for _, size in places)
    return packed(places, [n.to_bytes(size, "little", signed=n < 0) for n, size in zip(numbers, sizes, strict=True)])


def _with_tensor(one: Executed, multiply_adds: float) -> Executed:
    return replace(one, tensor=multiply_adds)


def _multiply_adds(launch: Launch, case: Case) -> float:
    return float(launch.arguments["row_count"]) * case.channels**2


def sample_of(grid: tuple[int, ...], count: int) -> list[tuple[int, int, int]]:
    programs = math.prod(grid)
    chosen = sorted({round(i * (programs - 1) / max(1, count - 1)) for i in range(count)})
    return [(one % grid[0], one // grid[0] % grid[1], one // (grid[0] * grid[1])) for one in chosen]


class _Key:
    """A launch by what decides its machine code."""

    def __init__(self, launch: Launch, types: dict[str, torch.dtype], arch: int) -> None:
        self.launch, self.types, self.arch = launch, types, arch
        self.key = (key_of(launch, types), launch.maxnreg, arch)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@dataclass(frozen=True)
class Compiled:
    """A kernel to run, what it uses, and (offset, bytes) of its parameters."""

    kernel: Kernel
    used: Resources
    parameters: list[tuple[int, int]]


@functools.cache
def _compiled(key: _Key) -> Compiled:
    launch, arch = key.launch, key.key[-1]
    made = compile_launch(launch.kernel, arguments_of(launch, key.types), launch.options, arch)
    cubin = made.asm["cubin"]
    kernel = Kernel(disassembled(cubin), arch, constants=constants(cubin, made.metadata.name))
    return Compiled(kernel, resources(made, arch), layout(made.asm["ptx"]))


def disassembled(cubin: bytes) -> str:
    """What nvdisasm prints of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


# ---- an operator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """Of one call of an operator: its launches, one after another."""

    launches: list[Predicted]
    outputs: int

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.launches) + GAP * len(self.launches)

    @property
    def fewest_programs(self) -> int:
        return min(one.programs for one in self.launches)

    def instructions_per_output(self, kernel: str) -> float:
        """Of a thread, for each element of a map."""
        return 32 * sum(one.instructions for one in self.launches if one.kernel == kernel) / self.outputs

    def of_kernel(self, kernel: str) -> float:
        """Seconds of all launches of a kernel, with their gaps."""
        return sum(one.seconds + GAP for one in self.launches if one.kernel == kernel)


def predict_plan(plan: Plan, case: Case, processor: Processor) -> Total:
    predicted: dict[tuple, Predicted] = {}
    launches = []
    for launch in plan.launches:
        key = (launch.name, launch.grid, *(value for value in launch.arguments.items() if value[0] not in _PLACES))
        if key not in predicted:
            predicted[key] = predict_launch(launch, plan, case, processor)
        launches.append(predicted[key])
    return Total(launches, case.batch * case.positions * case.channels)


# Where a chunk lies: does not change what is executed.
_PLACES = ("first_image", "first_row", "first_unit", "first_dagg")


def predict_operator(operator: str, stage: Stage, batch: int, dtype: torch.dtype, processor: Processor) -> Total:
    case = case_of(operator, stage, batch, dtype)
    return predict_plan(plan_of(operator, case, processor.device), case, processor)


def gpu_of(processor: Processor) -> Gpu:
    """For `floors.work`: the same device."""
    lanes = 32 * processor.device.sm_count * processor.clock
    return Gpu(
        processor.name, processor.bandwidth, 2 * processor.fma * lanes,
        2 * processor.tensor * processor.device.sm_count * processor.clock, processor.special * lanes,
        processor.device.l2_bytes, processor.device.sm_count, processor.device.arch,
    )  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows_of(operator: str, stage: Stage, batch: int, dtype: torch.dtype, processor: Processor) -> list[dict]:
    """A row for each kernel of the operator, and one for all of them."""
    total = predict_operator(operator, stage, batch, dtype, processor)
    head = {
        "case": "predicted",
        "operator": operator,
        "variant": stage.variant,
        "stage": stage.index + 1,
        "x": processor.name,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
    }
    floor = work(operator, stage, batch, dtype).seconds(gpu_of(processor), dtype)
    sources = plan_digest(plan_of(operator, case_of(operator, stage, batch, dtype), processor.device))
    rows = [
        head
        | {
            "subject": "all",
            "predicted_us": microseconds(total.seconds),
            "floor_us": microseconds(floor),
            "inductor_least_us": inductor_least_us(operator, stage, batch, dtype, processor),
            "launches": len(total.launches),
            "fewest_programs": total.fewest_programs,
            "digest": sources,
            "triton": triton.__version__,
        }
    ]
    for name in dict.fromkeys(one.kernel for one in total.launches):
        mine = [one for one in total.launches if one.kernel == name]
        slowest = max(mine, key=lambda one: one.seconds)
        rows.append(
            head
            | {
                "subject": name,
                "predicted_us": microseconds(total.of_kernel(name)),
                "launches": len(mine),
                "bound": slowest.bound,
                "programs": slowest.programs,
                "programs_per_sm": slowest.programs_per_sm,
                "waves": slowest.waves,
                "registers": slowest.registers,
                "shared": slowest.shared,
                "instructions_per_output": round(total.instructions_per_output(name), 1),
                "us_by": {resource: microseconds(sum(one.by[resource] for one in mine)) for resource in slowest.by},
            }
        )
    return rows


def inductor_least_us(operator: str, stage: Stage, batch: int, dtype: torch.dtype, processor: Processor) -> float:
    """The least that the reference takes under torch.compile (torch_launches.py)."""
    launches = torch_launches.compiled_reference(operator, stage)
    return microseconds(torch_launches.seconds(launches, stage, batch, dtype, processor))


def microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def plan_digest(plan: Plan) -> str:
    """Changes with the text of a kernel, with its constants and with what is launched."""
    parts = [
        f"{source(one)} {one.grid} {sorted(one.options.items())} {[*one.arguments.items(), *one.constexprs.items()]}"
        for one in plan.launches
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main(
    variant: Annotated[list[str] | None, typer.Option(help="Published variants.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="A100, RTX 4090, H100, B200.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    operator: Annotated[list[str], typer.Option(help="Operators; all.")] = [*OPERATORS],  # noqa: B006
    stage: Annotated[list[int], typer.Option(help="Stages, from 1.")] = [1, 2, 3, 4],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    dry: Annotated[bool, typer.Option(help="Print only.")] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Also what has a row of this source.")] = False,
) -> None:
    """Predict, print a table for each device and batch, and write the rows; by default all that is covered."""
    warnings.simplefilter("ignore")
    chosen = (variant, device, dtype, batch)
    defaults = (("tiny_lrf",), PREDICTED, ("bfloat16",), BATCHES)
    cases = [*itertools.product(*(given or default for given, default in zip(chosen, defaults, strict=True)))]
    everything = not any(chosen)
    whole = (row for row in read(FILE, NOWHERE) if row["subject"] == "all")
    have = {} if anew or dry else {call_of(row): row for row in whole}
    chosen_cases = COVERED if everything else cases
    work_of = [(case, have, tuple(stage), tuple(operator)) for case in chosen_cases]
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(work_of))) as pool:
        for (name, gpu, type_name, images), rows in zip(chosen_cases, pool.map(_rows_of_case, work_of), strict=True):
            if rows:
                show(rows, f"predicted, not measured: {name}, {gpu}, batch {images}, {type_name}")
            if rows and not dry:
                write([row | _versions() for row in rows], FILE, NOWHERE)
    if everything:
        for line in left_out_in_words():
            console.print(line, style="yellow", markup=False)


def _rows_of_case(work_of: tuple[tuple, dict, tuple[int, ...], tuple[str, ...]]) -> list[dict]:
    """Of one (variant, device, dtype, batch): the rows of calls that have none of this source."""
    warnings.simplefilter("ignore")
    (name, gpu, type_name, images), have, numbers, operators = work_of
    rows = []
    for number, op in itertools.product(numbers, operators):
        call = op, stages(name)[number - 1], images, getattr(torch, type_name), PROCESSORS[gpu]
        if not is_current(have.get((name, gpu, type_name, images, op, number)), *call):
            rows += rows_of(*call)
    return rows


def call_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("variant", "x", "dtype", "batch", "operator", "stage"))


def is_current(row: dict | None, operator: str, stage: Stage, batch: int, dtype: torch.dtype, gpu: Processor) -> bool:
    """Whether a row was predicted from this source with this Triton."""
    if row is None or row["triton"] != triton.__version__:
        return False
    return row["digest"] == plan_digest(plan_of(operator, case_of(operator, stage, batch, dtype), gpu.device))


def left_out() -> list[tuple[str, str, str, int]]:
    """(variant, device, dtype, batch) of the published sizes that have no rows."""
    return [one for one in itertools.product(VARIANTS, PREDICTED, DTYPES, BATCHES) if one not in COVERED]


def left_out_in_words() -> list[str]:
    """A line for each variant and device: the dtypes and batches without rows."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for name, gpu, dtype, batch in left_out():
        found.setdefault((name, gpu), {}).setdefault(dtype, []).append(batch)
    return [
        f"left out: {name}, {gpu}: "
        + "; ".join(f"{dtype} at batch {', '.join(map(str, batches))}" for dtype, batches in types.items())
        for (name, gpu), types in found.items()
    ]


def _versions() -> dict[str, str]:
    """Of what a prediction depends on."""
    return {name: version for name, version in versions().items() if name in ("focalnet", "triton")}


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in ("stage", "operator, kernel"):
        table.add_column(column, no_wrap=True)
    for column in (
        "launches",
        "us",
        "floor",
        "inductor >=",
        "bound",
        "programs",
        "a SM",
        "waves",
        "regs",
        "instr/output",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        whole = row["subject"] == "all"
        table.add_row(
            str(row["stage"]) if whole else "",
            row["operator"] if whole else f"  {row['subject']}",
            str(row["launches"]),
            f"{row['predicted_us']:.0f}",
            f"{row['floor_us']:.0f}" if whole else "",
            f"{row['inductor_least_us']:.0f}" if whole else "",
            *("" if whole else str(row[field]) for field in ("bound", "programs", "programs_per_sm", "waves")),
            *("" if whole else str(row[field]) for field in ("registers", "instructions_per_output")),
            style="bold" if whole else "",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

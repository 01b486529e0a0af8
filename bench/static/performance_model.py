"""Predicts the time of every Triton launch on a GPU that is not here, and says what binds it.

    python bench/static/performance_model.py           what has no row of this source, by use; Ctrl-C keeps the rest
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
bench/results/without-gpu/predicted.csv; predicted_calls.py says of what.
"""

from __future__ import annotations

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

import predicted_calls
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
from instruction_counts import Asked, Executed, Kernel
from launch_bytes import Bytes, bytes_of, ring_bytes
from machine_code import load_cycles
from parameters import layout, packed
from predicted_calls import Group
from processors import GAP, PROCESSORS, SCHEDULERS, Processor
from rich.console import Console
from rich.table import Table

from focalnet.benchmark.floors import OPERATORS, Gpu, Stage, stages, work

FILE = "predicted"
RESOURCES = ("issue", "l1", "chain", "fma", "alu", "special", "tensor", "l2", "dram")
FIELDS = (
    *("operator", "variant", "stage", "x", "dtype", "batch", "subject", "predicted_us", "floor_us"),
    *("inductor_least_us", "launches", "fewest_programs", "instructions_per_output", "bound", "programs"),
    *("programs_per_sm", "waves", "registers", "shared", *(f"us_{name}" for name in RESOURCES), "digest", "triton"),
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
    made = _compiled(_Key(launch, plan.dtype_of(), processor.device.arch))
    found = made.kernel.executed(*_asked(launch, plan, processor, made))
    programs = math.prod(launch.grid)
    on_tensor_cores = "PRECISION" in launch.constexprs and case.dtype.itemsize == 2
    if on_tensor_cores and not any(one.tensor or one.mma for one in found):
        # Tensor cores of data center Blackwell: the shape of a product is not in the instruction.
        share = _multiply_adds(launch, case) / programs
        found = [_with_tensor(one, share) for one in found]
    return predict(processor, made.used, found, programs, bytes_of(launch, plan, case, processor.device))


def _asked(launch: Launch, plan: Plan, processor: Processor, made: Compiled) -> Asked:
    load = load_cycles(min(1.0, processor.device.on_chip_bytes / max(1, ring_bytes(launch, plan))))
    given = warp.Launch(parameters_of(launch, made.parameters), launch.grid, made.used.threads)
    return given, tuple(sample_of(launch.grid, SAMPLE)), load


def prepare(plans: Sequence[Plan], processor: Processor) -> None:
    """Run the machine code of several plans at once: launches of a kernel run side by side."""
    by_kernel: dict[_Key, list[tuple[Launch, Plan]]] = {}
    for plan in plans:
        for launch in _different(plan).values():
            by_kernel.setdefault(_Key(launch, plan.dtype_of(), processor.device.arch), []).append((launch, plan))
    for key, its_launches in by_kernel.items():
        made = _compiled(key)
        made.kernel.prepare(_asked(launch, plan, processor, made) for launch, plan in its_launches)


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


@functools.lru_cache(128)
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

    def instructions_per_output(self, kernel: str | None = None) -> float:
        """Of a thread, for each element of a map; of one ``kernel`` or of all."""
        return 32 * sum(one.instructions for one in self.launches if kernel in (None, one.kernel)) / self.outputs

    def of_kernel(self, kernel: str) -> float:
        """Seconds of all launches of a kernel, with their gaps."""
        return sum(one.seconds + GAP for one in self.launches if one.kernel == kernel)


def predict_plan(plan: Plan, case: Case, processor: Processor) -> Total:
    predicted = {key: predict_launch(one, plan, case, processor) for key, one in _different(plan).items()}
    launches = [predicted[_work_of(launch)] for launch in plan.launches]
    return Total(launches, case.batch * case.positions * case.channels)


def _different(plan: Plan) -> dict[tuple, Launch]:
    """The launches that do different work."""
    found: dict[tuple, Launch] = {}
    for launch in plan.launches:
        found.setdefault(_work_of(launch), launch)
    return found


def _work_of(launch: Launch) -> tuple:
    return launch.name, launch.grid, *(value for value in launch.arguments.items() if value[0] not in _PLACES)


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
        "operator": operator,
        "variant": stage.variant,
        "stage": stage.index + 1,
        "x": processor.name,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
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
            "instructions_per_output": round(total.instructions_per_output(), 1),
            "bound": max(total.launches, key=lambda one: one.seconds).bound,
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
                **{f"us_{unit}": microseconds(sum(one.by[unit] for one in mine)) for unit in RESOURCES},
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


# ---- the command ----------------------------------------------------------------------------------------------------


def main(
    variant: Annotated[list[str] | None, typer.Option(help="Published variants.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="A100, RTX 4090, H100, B200.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    operator: Annotated[list[str], typer.Option(help="Operators; all.")] = [*OPERATORS],  # noqa: B006
    stage: Annotated[list[int], typer.Option(help="Stages, from 1.")] = [1, 2, 3, 4],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    dry: Annotated[bool, typer.Option(help="Print only.")] = False,
) -> None:
    """Predict all that has no row of this source. With --dry or a choice of calls, print those and write nothing."""
    if dry or any((variant, device, batch, dtype)):
        chosen = (variant, device, dtype, batch)
        defaults = (["tiny_lrf"], [*PROCESSORS], ["bfloat16"], [128])
        for name, gpu, type_name, images in itertools.product(
            *(a or b for a, b in zip(chosen, defaults, strict=True))
        ):
            found = [one for one in stages(name) if one.index + 1 in stage]
            calls = [(op, one, images, getattr(torch, type_name), PROCESSORS[gpu]) for one in found for op in operator]
            rows = [row for call in calls for row in rows_of(*call)]
            show(rows, f"predicted, not measured: {name}, {gpu}, batch {images}, {type_name}")
        return
    TABLE.fill(rows_of_group, jobs)


def rows_of_group(group: Group, its_stages: Sequence[Stage]) -> list[dict]:
    """A row for each call; of the detailed variants one for each kernel too."""
    warnings.simplefilter("ignore")
    processor, dtype = PROCESSORS[group.device], getattr(torch, group.dtype)
    rows: list[dict] = []
    calls = [(operator, stage) for operator in group.operators(OPERATORS) for stage in its_stages]
    prepare(
        [plan_of(name, case_of(name, one, group.batch, dtype), processor.device) for name, one in calls], processor
    )
    for operator, stage in calls:
        rows += predicted_calls.kept(rows_of(operator, stage, group.batch, dtype, processor))
    return rows


def is_current(row: dict) -> bool:
    """Whether the row of a call was predicted from this source with this Triton."""
    stage, device = stages(row["variant"])[row["stage"] - 1], PROCESSORS[row["x"]].device
    case = case_of(row["operator"], stage, row["batch"], getattr(torch, row["dtype"]))
    return (row["triton"], row["digest"]) == (triton.__version__, plan_digest(plan_of(row["operator"], case, device)))


TABLE = predicted_calls.Table(FILE, FIELDS, OPERATORS, is_current)


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

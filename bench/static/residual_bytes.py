"""Counts the bytes that a block moves outside its matrix products and its focal modulation, plain and fused.

    TRITON_INTERPRET=1 python bench/static/residual_bytes.py --variant tiny_lrf --variant large_fl3 --variant huge_fl3

"Plain" are PyTorch's operators one by one, with the bytes of their inputs and outputs. Data that an operator reads
twice counts once, which favours plain. "Fused" are the kernels of kernels/residual.py, residual_norm.py and
layer_norm.py: the interpreter counts the distinct bytes of every tensor in each program. Parameters count for every
program that reads them, partial sums when they are written and when they are read. "Least" counts every input and
output once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from bytes_moved import NOWHERE
from focalnet.kernels import layer_norm, residual, residual_norm
from focalnet.kernels.launch_table import row_config
from focalnet.kernels.plan import H100, Device, Launch, Plan
from focalnet.kernels.rows import RowsCase
from rich.console import Console
from rich.table import Table
from torch import Tensor
from traffic import Counter

from focalnet.benchmark.counters import OperatorCounter
from focalnet.benchmark.environment import commit, versions
from focalnet.benchmark.floors import Stage, stages
from focalnet.benchmark.rows import write
from focalnet.models.mlp import DropPath
from focalnet.variants import VARIANTS

RATE, EPS = 0.1, 1e-5  # of stochastic depth, of the norms
SAMPLE = 2  # programs of a launch that are counted: the first and the last
REGISTERS = 65536  # of 4 bytes, of a multiprocessor
console = Console()


@dataclass(frozen=True)
class End:
    """The end of a branch in a block of a variant, or a norm before a linear layer, at one of its stages.

    drops: stochastic depth takes part, in training with a rate.
    part: "sum, then norm" (the first branch of a block with its norms before the branches), "sum" (the second),
    "norm, then sum" (both branches of a block with the norms behind them), or "norm" (one whose output is made anew in
    backward: before projection_in, and in huge before projection_out).
    """

    part: str
    stage: Stage
    batch: int
    dtype: torch.dtype
    training: bool
    layer_scale: bool
    drops: bool

    @property
    def positions(self) -> int:
        return self.stage.height * self.stage.width

    @property
    def rows(self) -> int:
        return self.batch * self.positions

    @property
    def scales(self) -> list[str]:
        """What scales the branch."""
        return [name for name, is_there in (("gamma", self.layer_scale), ("kept", self.drops)) if is_there]

    @property
    def plane(self) -> int:
        """Bytes of one pass over all rows."""
        return self.rows * self.stage.channels * self.dtype.itemsize


def ends(variant: str, batch: int, dtype: torch.dtype) -> Iterator[End]:
    fields = VARIANTS[variant]
    parts = ["norm, then sum"] if fields.use_post_layernorm else ["sum, then norm", "sum", "norm"]
    if fields.use_post_layernorm_in_modulation:
        parts.append("norm")
    for stage in stages(variant):
        for training in (False, True):
            for part in parts:
                yield End(part, stage, batch, dtype, training, fields.use_layerscale, drops=training)


# ---- plain ----------------------------------------------------------------------------------------------------------


def plain_bytes(end: End) -> tuple[int, int]:
    """(forward, backward) of PyTorch's operators; backward 0 in inference."""
    shape = (end.batch, end.stage.height, end.stage.width, end.stage.channels)

    def tensor(*size: int) -> Tensor:
        return torch.empty(size, dtype=end.dtype, device="meta", requires_grad=end.training)

    arguments = [tensor(*shape), tensor(*shape), *(tensor(shape[-1]) for _ in range(3))]
    with OperatorCounter() as forward, torch.set_grad_enabled(end.training):
        outs = _plain(end, DropPath(RATE).train(end.training), *arguments)
    if not end.training:
        return forward.bytes, 0
    wanted = [a for a, is_used in zip(arguments, _used(end), strict=True) if is_used]
    with OperatorCounter() as backward:
        torch.autograd.grad(outs, wanted, [torch.empty_like(out) for out in outs])
        if end.part == "norm":
            # What norm_linear does without a kernel of its own: the norm once more, from its input.
            torch.native_layer_norm(arguments[0], shape[-1:], arguments[3], arguments[4], EPS)
    return forward.bytes, backward.bytes


def _plain(end: End, drop_path: DropPath, h: Tensor, y: Tensor, gamma: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w, b, EPS)

    if end.part == "norm":
        return [norm(h)]
    if end.part == "norm, then sum":
        y = norm(y)
    if end.layer_scale:
        y = gamma * y
    out = h + drop_path(y)
    return [out, norm(out)] if end.part == "sum, then norm" else [out]


def _used(end: End) -> tuple[bool, ...]:
    """Which of h, y, gamma, w, b take part."""
    has_sum = end.part != "norm"
    has_norm = end.part != "sum"
    return True, has_sum, has_sum and end.layer_scale, has_norm, has_norm


# ---- fused ----------------------------------------------------------------------------------------------------------


# Under autocast a branch returns, and a linear layer wants, the lower precision; sums, norms and scales have float32.
LOWER = {"update", "kept", "normed", "dnormed", "dupdate"}
KERNELS = {"sum, then norm": residual_norm, "sum": residual, "norm, then sum": residual, "norm": layer_norm}


def plans(end: End, device: Device = H100, lower: torch.dtype | None = None) -> list[Plan | None]:
    """(forward, backward): what is launched; None where PyTorch's operators do it, or nothing.

    ``lower``: autocast's dtype, if that is on.
    """
    kernels, found = KERNELS[end.part], []
    sums = {"sum, then norm": 2 + end.layer_scale, "sum": int(end.layer_scale), "norm, then sum": 3, "norm": 2}
    for name, tensors in (("forward_plan", forward(end)), ("backward_plan", backward(end))):
        if tensors is None:
            found.append(None)
            continue
        operands, outputs = ({n: lower if lower and n in LOWER else end.dtype for n in names} for names in tensors)
        count = sums[end.part] if "sums" in outputs else 0
        case = RowsCase(end.rows, end.positions, end.stage.channels, operands, outputs, count, keep=1 - RATE, eps=EPS)
        found.append(getattr(kernels, name)(case, device))
    return found


def forward(end: End) -> tuple[list[str], list[str]] | None:
    """(operands, outputs) of the forward kernel."""
    if end.part == "norm" or (end.part == "sum" and not end.scales):
        return None
    norm = [] if end.part == "sum" else ["weight", "bias"]
    outputs = ["out", "normed"] if end.part == "sum, then norm" else ["out"]
    return ["hidden_state", "update", *end.scales, *norm], outputs


def backward(end: End) -> tuple[list[str], list[str]] | None:
    """(operands, outputs) of the backward kernel, every gradient asked for."""
    if not end.training or (end.part == "sum" and not end.scales):
        return None
    update = ["update"] if end.layer_scale else []
    if end.part == "sum":
        return ["dout", *update, *end.scales], ["dupdate", *(["sums"] if end.layer_scale else [])]
    if end.part == "norm, then sum":
        return ["dout", "update", *end.scales, "weight", "bias"], ["dupdate", "sums"]
    if end.part == "norm":
        return ["dnormed", "hidden_state", "weight", "bias"], ["dhidden_state", "normed", "sums"]
    # Where nothing scales the branch, both gradients are one tensor.
    dupdate = ["dupdate"] if end.scales else []
    return ["dout", "dnormed", "out", *update, *end.scales, "weight"], ["dhidden_state", *dupdate, "sums"]


def counted_bytes(plan: Plan, end: End) -> float:
    """What all launches of the plan load and store."""
    channels, types = end.stage.channels, plan.dtype_of()
    vectors = {"gamma": channels, "weight": channels, "bias": channels, "kept": end.batch}
    sizes = {name: vectors.get(name, end.rows * channels) for name in plan.operands}
    sizes |= {name: math.prod(buffer.shape) for name, buffer in plan.buffers.items()}
    tensors = {name: torch.empty(size, dtype=types[name]) for name, size in sizes.items()}
    return sum(_counted(launch, tensors, end.rows) for launch in plan.launches)


def _counted(launch: Launch, tensors: dict[str, Tensor], positions: int) -> float:
    counter = Counter(tensors, programs=SAMPLE)
    arguments = {name: tensors.get(value, value) for name, value in launch.arguments.items()}
    with counter.watching():
        launch.kernel[launch.grid](**arguments, **launch.constexprs, num_warps=launch.num_warps)
    (found,) = counter.launches
    if found.hazards:
        raise RuntimeError("\n".join(map(str, found.hazards)))
    touched = {
        name: found.loaded.get(name, 0) + found.stored.get(name, 0) for name in {**found.loaded, **found.stored}
    }
    if "ROWS" in launch.constexprs:
        # The counter takes the sampled programs for the mean, but those at the end may have a tile less.
        share = positions / found.programs / (_rows_of_sample(launch, positions) / found.sampled)
        touched = {n: bytes_ * (share if tensors[n].numel() >= positions else 1) for n, bytes_ in touched.items()}
    return sum(touched.values())


def _rows_of_sample(launch: Launch, positions: int) -> int:
    """How many rows the sampled programs have together."""
    programs, rows = launch.grid[0], launch.constexprs["ROWS"]
    count = min(SAMPLE, programs)
    chosen = {round(i * (programs - 1) / max(count - 1, 1)) for i in range(count)}
    tiles = (range(program, math.ceil(positions / rows), programs) for program in chosen)
    return sum(min(rows, positions - tile * rows) for of_program in tiles for tile in of_program)


def least_bytes(plan: Plan, end: End) -> int:
    """Every operand and every output of rows once."""
    rows = [name for name in plan.operands if name not in ("gamma", "kept", "weight", "bias")]
    outputs = [name for name, buffer in plan.buffers.items() if buffer.is_output and name != "sums"]
    return (len(rows) + len(outputs)) * end.plane


# ---- a norm inside the modulation: epilogue of the product, or a pass of its own ------------------------------------


def epilogue(channels: int) -> dict:
    """What it would take to end the modulator's product with the norm, in passes over [rows, C].

    A program has to hold whole rows of the product, BLOCK_M of C float32 accumulators. They get half of the registers
    of a multiprocessor at most, which bounds BLOCK_M, and every BLOCK_M rows read the weight [C, C] again: C / BLOCK_M
    passes. Saved are a read and a write in inference, and in training, where backward needs the norm's input, a read.
    """
    columns = row_config(channels, backward=False).block_c
    block_m = REGISTERS // 2 // columns
    return {
        "block_m": block_m,
        "weight_passes": channels / block_m,
        "saved_passes_inference": 2,
        "saved_passes_training": 1,
    }


# ---- the table ------------------------------------------------------------------------------------------------------


def row(end: End) -> dict:
    plain = plain_bytes(end)
    made = plans(end)
    # The part that is PyTorch's either way moves what it moves.
    fused = [p if plan is None else counted_bytes(plan, end) for plan, p in zip(made, plain, strict=True)]
    least = [p if plan is None else least_bytes(plan, end) for plan, p in zip(made, plain, strict=True)]
    return {
        "case": "residual_bytes",
        "operator": end.part,
        "variant": end.stage.variant,
        "stage": end.stage.index + 1,
        "series": "training" if end.training else "inference",
        "batch": end.batch,
        "dtype": str(end.dtype).removeprefix("torch."),
        "shape": [end.batch, end.stage.height, end.stage.width, end.stage.channels],
        "planned_for": "NVIDIA H100",
        "plane_bytes": end.plane,
        "plain_bytes": plain,
        "bytes": fused,
        "least_bytes": least,
        "commit": commit(),
        **versions(),
    }


def epilogue_rows(variant: str) -> list[dict]:
    return [
        {"case": "norm as epilogue", "variant": variant, "stage": stage.index + 1, "channels": stage.channels}
        | epilogue(stage.channels)
        for stage in stages(variant)
    ]


def show(rows: list[dict]) -> None:
    first = rows[0]
    table = Table(title=f"{first['variant']}, batch {first['batch']}, {first['dtype']}: passes over (B, H, W, C)")
    for column in ("map", "part", "in"):
        table.add_column(column, no_wrap=True)
    for column in ("fwd", "fused", "least", "bwd", "fused", "least"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in rows:
        figures = zip(found["plain_bytes"], found["bytes"], found["least_bytes"], strict=True)
        cells = [f"{f / found['plane_bytes']:.2f}" if f else "" for direction in figures for f in direction]
        name = f"{found['shape'][1]}² x {found['shape'][3]}"
        table.add_row(name, found["operator"], found["series"], *cells)
    console.print(table)


def show_epilogues(rows: list[dict]) -> None:
    for found in rows:
        console.print(
            f"{found['variant']}, {found['channels']} channels, norm as the product's epilogue: at most "
            f"{found['block_m']} rows a program, the weight read again costs {found['weight_passes']:.1f} passes, "
            f"saved are {found['saved_passes_inference']} (inference) or {found['saved_passes_training']} (training)"
        )


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = [  # noqa: B006
        "tiny_lrf",
        "base_lrf",
        "large_fl3",
        "huge_fl3",
    ],
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
) -> None:
    """Count, print a table for each variant, and write the rows."""
    for name in variant:
        found = [row(end) for end in ends(name, batch, getattr(torch, dtype)) if end.training or end.part != "norm"]
        show(found)
        if VARIANTS[name].use_post_layernorm_in_modulation:
            found += epilogue_rows(name)
            show_epilogues(found[-len(stages(name)) :])
        write(found, "residual_bytes", NOWHERE)


if __name__ == "__main__":
    typer.run(main)

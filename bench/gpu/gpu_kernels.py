"""Times the operators on a GPU at the sizes of each stage: time, bytes per second and share of the floor.

    python bench/gpu/gpu_kernels.py --variant tiny_lrf --variant base_lrf --batch 128

The operator is compared with the reference, eager and compiled, and the whole module with transformers' and timm's, in
both memory formats. The rows go to bench/results/<device>/kernels.json. Without a GPU the script prints the floors and
measures nothing. ``--device cpu`` tests the script itself on a small batch and writes nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import focalnet
from focalnet.benchmark.environment import device as device_name
from focalnet.benchmark.environment import facts
from focalnet.benchmark.floors import H100, OPERATORS, Gpu, Stage, gpu_named, stages, work
from focalnet.benchmark.operators import able_backends
from focalnet.benchmark.rows import write
from focalnet.benchmark.timing import copies_past_cache, measure
from focalnet.benchmark.torchvision_stub import stubbed_torchvision
from focalnet.operators.norm_linear import padded_empty

console = Console()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_MEASURED = "not measured on a GPU yet"


# ---- what is compared: each makes a call out of a stage -------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A stage with a batch and a dtype; ``operator`` is one of `floors.OPERATORS`, or "module" or "block", each also
    with "_bwd"."""

    operator: str
    stage: Stage
    batch: int
    dtype: torch.dtype
    device: str

    @property
    def backward(self) -> bool:
        return self.operator.endswith("_bwd")


def operands(case: Case) -> dict[str, object]:
    """Arguments of `focalnet.focal_modulation`, made as the module makes them: views of one padded projection."""
    stage, channels = case.stage, case.stage.channels

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, device=case.device) * scale).to(case.dtype)

    shape = (case.batch, stage.height, stage.width, 2 * channels + stage.levels + 1)
    packed = padded_empty(normal(0), shape).normal_().requires_grad_(case.backward)
    q, ctx, gates = packed.split([channels, channels, stage.levels + 1], dim=-1)
    weights = [normal(channels, 1, k, k, scale=1 / k) for k in stage.kernels]
    weight, bias = normal(channels, channels, scale=channels**-0.5), normal(channels)
    for tensor in (*weights, weight, bias):
        tensor.requires_grad_(case.backward)
    return {"q": q, "ctx": ctx, "gates": gates, "focal_weights": weights, "weight": weight, "bias": bias}


def leaves(arguments: dict[str, object]) -> list[torch.Tensor]:
    """What gradients are asked for: the views, not the packed tensor, whose gradient is one more copy."""
    tensors = itertools.chain(*(a if isinstance(a, list) else [a] for a in arguments.values()))
    return [tensor for tensor in tensors if tensor.requires_grad]


def operator_call(case: Case, function: Callable) -> Callable[[], object]:
    """``function`` on operands of the case; for a backward only the backward, its forward done before."""
    arguments = operands(case)
    if case.operator.startswith("gated_aggregation"):
        arguments = {name: arguments[name] for name in ("ctx", "gates", "focal_weights")}
    if not case.backward:
        return torch.inference_mode()(lambda: function(**arguments))
    return backward_of(function(**arguments), leaves(arguments))


def backward_of(out: torch.Tensor, inputs: list[torch.Tensor]) -> Callable[[], object]:
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def ours(case: Case, backend: str) -> Callable[[], object]:
    function = getattr(focalnet, case.operator.removesuffix("_bwd"))
    return operator_call(case, functools.partial(function, backend=backend))


def reference(case: Case) -> Callable[[], object]:
    return operator_call(case, getattr(focalnet.reference, case.operator.removesuffix("_bwd")))


def compiled_reference(case: Case) -> Callable[[], object]:
    return operator_call(case, torch.compile(getattr(focalnet.reference, case.operator.removesuffix("_bwd"))))


def module_call(case: Case, module: torch.nn.Module, channels_last: bool = True) -> Callable[[], object]:
    """A module from (B, H, W, C) to (B, H, W, C), or NCHW in memory where ``channels_last`` is false."""
    module = module.to(device=case.device, dtype=case.dtype).requires_grad_(case.backward)
    stage = case.stage
    x = torch.randn(case.batch, stage.height, stage.width, stage.channels, device=case.device, dtype=case.dtype)
    if not channels_last:
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    x.requires_grad_(case.backward)
    if not case.backward:
        return torch.inference_mode()(lambda: module(x))
    return backward_of(module(x), [x, *module.parameters()])


def our_module(case: Case) -> Callable[[], object]:
    stage = case.stage
    return module_call(case, focalnet.FocalModulation(stage.channels, stage.kernels[0], stage.levels))


def transformers_module(case: Case, wrap: Callable = lambda module: module, channels_last: bool = True) -> Callable:
    from transformers import FocalNetConfig
    from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

    stage = case.stage
    config = FocalNetConfig(focal_levels=[stage.levels], focal_windows=[stage.kernels[0]])
    return module_call(case, wrap(FocalNetModulation(config, index=0, dim=stage.channels)), channels_last)


def timm_module(case: Case, wrap: Callable = lambda module: module, channels_last: bool = True) -> Callable:
    with stubbed_torchvision():
        from timm.models.focalnet import FocalModulation

    stage = case.stage
    inner = FocalModulation(stage.channels, stage.kernels[0], stage.levels)
    return module_call(case, _Permuted(wrap(inner)), channels_last)


class _Permuted(torch.nn.Module):
    """timm's module takes NCHW: the permuted view of channels-last memory is what it calls channels-last."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def our_block(case: Case, one_by_one: bool = False) -> Callable[[], object]:
    """A block of the stage; ``one_by_one``: the ends of its branches as PyTorch's operators (see gpu_block)."""
    from focalnet.models.layers import DropPath, FocalNetLayer

    config = focalnet.FocalNetConfig.from_variant(case.stage.variant)
    block = FocalNetLayer(config, case.stage.index, drop_path=0.1)
    if one_by_one:
        # A part of another class, beside which no end of a branch is fused.
        block.drop_path = type("OtherDropPath", (DropPath,), {})(0.1)
    return module_call(case, block)


def transformers_block(case: Case, wrap: Callable = lambda module: module) -> Callable[[], object]:
    from transformers import FocalNetConfig
    from transformers.models.focalnet.modeling_focalnet import FocalNetLayer

    stage, fields = case.stage, focalnet.FocalNetConfig.from_variant(case.stage.variant).to_dict()
    layer = FocalNetLayer(FocalNetConfig(**fields), stage.index, stage.channels, None, drop_path=0.1)
    return module_call(case, _OfTokens(wrap(layer)))


class _OfTokens(torch.nn.Module):
    """transformers' block takes (B, H * W, C), and H and W."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.flatten(1, 2), x.shape[1:3]).view(x.shape)


OF_OPERATORS = {"reference": reference, "reference, torch.compile": compiled_reference}
OF_MODULES = {
    "focalnet": our_module,
    "transformers": transformers_module,
    "transformers, channels first": lambda case: transformers_module(case, channels_last=False),
    "transformers, torch.compile": lambda case: transformers_module(case, torch.compile),
    "timm, channels-last": timm_module,
    "timm": lambda case: timm_module(case, channels_last=False),
    "timm, torch.compile": lambda case: timm_module(case, torch.compile),
}
OF_BLOCKS = {
    "focalnet": our_block,
    "focalnet, ends of branches one by one": functools.partial(our_block, one_by_one=True),
    "transformers": transformers_block,
    "transformers, torch.compile": lambda case: transformers_block(case, torch.compile),
}


def implementations(case: Case) -> dict[str, Callable[[Case], Callable[[], object]]]:
    """Ours by every backend that runs on the device, then what it is compared with."""
    if case.operator not in OPERATORS:
        return OF_BLOCKS if case.operator.startswith("block") else OF_MODULES
    mine = [name for name in able_backends(case.device) if name != "reference"]
    return {f"focalnet, {name}": functools.partial(ours, backend=name) for name in mine} | OF_OPERATORS


def cases(
    names: list[str], batch: int, dtypes: list[str], device: str, operators_only: bool = False
) -> Iterator[Case]:
    around = () if operators_only else ("module", "module_bwd", "block", "block_bwd")
    for name, dtype in itertools.product(names, dtypes):
        for stage in stages(name):
            for operator in (*OPERATORS, *around):
                yield Case(operator, stage, batch, DTYPES[dtype], device)


# ---- measuring ------------------------------------------------------------------------------------------------------


def measured(case: Case, rounds: int, runtimes: list[str] | None = None) -> list[dict]:
    """A row for every implementation that is installed, or of these; one that does not fit says so in its row."""
    # Else a second shape would be compiled for any shape, slower than for its own.
    torch.compiler.reset()
    calls, failed = {}, {}
    for name, make in implementations(case).items():
        if runtimes and name not in runtimes:
            continue
        try:
            calls[name] = rotating(case, make)
            calls[name](0)
        except ModuleNotFoundError:
            calls.pop(name, None)
        except torch.OutOfMemoryError as error:
            calls.pop(name, None)
            failed[name] = {"failed": str(error).split("\n")[0]}
    timings = measure(calls, case.device, rounds)
    figures = {name: timing.row() for name, timing in timings.items()} | failed
    return [row(case, name, found) for name, found in figures.items()]


def rotating(case: Case, make: Callable) -> Callable[[int], object]:
    """Sets of operands taken in turn: none is in a cache when its turn comes."""
    operator = case.operator if case.operator in OPERATORS else OPERATORS[2 + case.backward]
    bytes_per_call = work(operator, case.stage, case.batch, case.dtype).bytes
    sets = [make(case) for _ in range(copies_past_cache(bytes_per_call, case.device))]
    return lambda number: sets[number % len(sets)]()


def row(case: Case, name: str, figures: dict) -> dict:
    found = {
        "case": "kernel",
        "operator": case.operator,
        "runtime": name,
        "variant": case.stage.variant,
        "stage": case.stage.index + 1,
        "batch": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": [case.batch, case.stage.height, case.stage.width, case.stage.channels],
        "kernels": list(case.stage.kernels),
        **figures,
    }
    if case.operator not in OPERATORS:
        return found
    least = work(case.operator, case.stage, case.batch, case.dtype)
    found |= {"least_bytes": least.bytes, "fma": least.fma, "erf": least.erf, "matrix": least.matrix}
    if "median_s" in found:
        found["bytes_per_s"] = least.bytes / found["median_s"]
    gpu = gpu_named(torch.cuda.get_device_name()) if case.device == "cuda" else None
    if gpu is not None and "median_s" in found:
        found["floor_s"] = least.seconds(gpu, case.dtype)
        found["share_of_floor"] = found["floor_s"] / found["median_s"]
    return found


# ---- showing --------------------------------------------------------------------------------------------------------


def show_floors(names: list[str], batch: int, dtypes: list[str], gpu: Gpu) -> None:
    for name, dtype in itertools.product(names, dtypes):
        title = f"{name}, batch {batch}, {dtype}: the least an {gpu.name} needs (time: {NOT_MEASURED})"
        table = Table(title=title)
        for column in ("stage", "operator"):
            table.add_column(column, no_wrap=True)
        for column in ("MB", "G FMA", "M erf", "µs", "bound by"):
            table.add_column(column, justify="right", no_wrap=True)
        for stage, operator in itertools.product(stages(name), OPERATORS):
            least = work(operator, stage, batch, DTYPES[dtype])
            floors = least.floors(gpu, DTYPES[dtype])
            bound = max(floors, key=floors.get)
            table.add_row(
                f"{stage.height}x{stage.width}x{stage.channels}",
                operator,
                f"{least.bytes / 1e6:.1f}",
                f"{least.fma / 1e9:.2f}",
                f"{least.erf / 1e6:.0f}",
                f"{floors[bound] * 1e6:.1f}",
                bound,
            )
        console.print(table)


def show(rows: list[dict]) -> None:
    first = rows[0]
    shape = "x".join(str(n) for n in first["shape"])
    table = Table(title=f"{first['operator']}, {first['variant']} stage {first['stage']}, {shape}, {first['dtype']}")
    table.add_column("runtime", no_wrap=True)
    for column in ("median µs", "quartiles", "GB/s", "of floor", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in rows:
        if "failed" in found:
            table.add_row(found["runtime"], found["failed"])
            continue
        table.add_row(
            found["runtime"],
            f"{found['median_s'] * 1e6:.1f}",
            "-".join(f"{s * 1e6:.0f}" for s in found["quartiles_s"]),
            f"{found['bytes_per_s'] / 1e9:.0f}" if "bytes_per_s" in found else "",
            f"{found['share_of_floor']:.0%}" if "share_of_floor" in found else "",
            f"{found['median_s'] / first['median_s']:.2f}" if "median_s" in first else "",
        )
    console.print(table)


def main(
    variant: Annotated[list[str], typer.Option(help="Published variants.")] = ["tiny_lrf", "base_lrf"],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16, float16.")] = ["bfloat16", "float32", "float16"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Measured blocks of calls of each.")] = 15,
    runtime: Annotated[list[str] | None, typer.Option(help="Names as in the tables; all.")] = None,
    operators_only: Annotated[bool, typer.Option("--operators-only", help="No modules and no blocks.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu to try the script.")] = None,
    floors_only: Annotated[bool, typer.Option("--floors", help="Print the floors and measure nothing.")] = False,
) -> None:
    """Measure the operators and the module stage by stage, and write the rows."""
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None or floors_only:
        show_floors(variant, batch, dtype, (device and gpu_named(torch.cuda.get_device_name())) or H100)
        return
    environment, wanted = facts(device), list(cases(variant, batch, dtype, device, operators_only))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in progress.track(wanted, description="measuring"):
            found = [one | environment for one in measured(case, rounds, runtime)]
            if not found:
                continue
            show(found)
            if device == "cuda":
                write(found, "kernels", device_name(device))


if __name__ == "__main__":
    typer.run(main)

"""Compiles every Triton kernel that the other parts launch, many at a time, into Triton's cache.

    python bench/gpu/gpu_precompile.py [--processes 14]

What is needed first is compiled first: the stages that are measured, then those whose numbers are checked, then the
plans of the sweep. A kernel is compiled as its launch would compile it, with the driver and nothing of the tensors.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from focalnet.kernels import launch_table
from focalnet.kernels.operators import PLANS
from focalnet.kernels.padding import padded_row
from focalnet.kernels.plan import Case, Device, Launch, Plan
from gpu_numbers import DTYPES, SHAPES

from focalnet.benchmark.floors import OPERATORS, stages

sys.path.append(str(Path(__file__).resolve().parents[1] / "static"))
from residual_bytes import ends
from residual_bytes import plans as plans_of_ends

MEASURED = (("tiny_lrf", 128), ("tiny_lrf", 1), ("large_fl3", 32))
MASKS = {"gated_aggregation_bwd": (True,) * 3, "focal_modulation_bwd": (True,) * 6}


def cases() -> Iterator[tuple[str, Case]]:
    """(operator, call) in the order in which they are needed."""
    for operator, (variant, batch) in itertools.product(OPERATORS, MEASURED):
        for stage in stages(variant):
            yield operator, _case(operator, (batch, stage.height, stage.width, stage.channels), stage.kernels)
    for operator, shape, dtype in itertools.product(("focal_modulation", "focal_modulation_bwd"), SHAPES, DTYPES):
        size = (shape.batch, shape.height, shape.width, shape.channels)
        yield operator, _case(operator, size, shape.kernels, dtype, padded=False)
        yield operator, _of_tensors(operator, size, shape.kernels, dtype)


def _of_tensors(operator: str, size: tuple[int, ...], kernels: tuple, dtype: torch.dtype) -> Case:
    """As tests/triton makes it: q, ctx and gates are tensors of their own."""
    case, channels = _case(operator, size, kernels, dtype), size[3]
    return replace(case, ctx_pitch=channels, gates_pitch=len(kernels) + 1, q_pitch=channels)


def _case(
    operator: str, size: tuple[int, ...], kernels: tuple, dtype: torch.dtype = torch.bfloat16, padded: bool = True
) -> Case:
    """As a model makes it: views of one projection with padded rows, or, ``padded`` false, as gpu_numbers makes it."""
    features = 2 * size[3] + len(kernels) + 1
    pitch = padded_row(features) if padded else features
    has_product = operator.startswith("focal_modulation")
    return Case(
        *size, tuple((k, k) for k in kernels), dtype, False, pitch, pitch, pitch if has_product else 0, has_product,
        MASKS.get(operator, ()),
    )  # fmt: skip


# (stream's dtype, autocast's dtype, training) of the models that are measured.
MODELS = ((torch.bfloat16, None, False), (torch.float32, torch.bfloat16, True))


def plans_of_models(device: Device) -> Iterator[Plan]:
    """The ends of residual branches and the LayerNorms."""
    for dtype, lower, training in MODELS:
        for end in ends("tiny_lrf", 128, dtype):
            if end.training == training:
                yield from filter(None, plans_of_ends(end, device, lower))


def plans(device: Device) -> Iterator[Plan]:
    """Those of the table for every call, those of models, then those that the sweep tries."""
    for operator, case in cases():
        yield PLANS[operator](case, device)
    yield from plans_of_models(device)
    for stage, operator in itertools.product(stages("tiny_lrf"), ("focal_modulation", "focal_modulation_bwd")):
        case = _case(operator, (128, stage.height, stage.width, stage.channels), stage.kernels)
        for config in launch_table.level_candidates(
            case.height, case.width, case.channels, case.kernel_heights, case.dtype
        ):
            yield PLANS[operator](case, device, config)


@functools.cache
def launches(device: Device) -> list[tuple[Launch, dict[str, torch.dtype]]]:
    """Launches that compile to different code, with the dtypes of their tensors."""
    found: dict[tuple, tuple[Launch, dict[str, torch.dtype]]] = {}
    for plan in plans(device):
        types = plan.dtype_of()
        for launch in plan.launches:
            tensors = tuple(types.get(value, "number") for value in launch.arguments.values())
            key = launch.name, tensors, *launch.constexprs.items(), *launch.options.items()
            found.setdefault(key, (launch, types))
    return list(found.values())


def precompile(number: int, device: Device) -> str | None:
    """Compile one of `launches`; the reason if that fails. Runs in a process of the pool."""
    launch, types = launches(device)[number]
    arguments = [types[value] if isinstance(value, str) else value for value in launch.arguments.values()]
    try:
        launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constexprs, **launch.options)
    except Exception as error:
        return f"{launch.name}: {type(error).__name__}: {error}".splitlines()[0]
    return None


def main(processes: Annotated[int, typer.Option(help="Compilers at once.")] = 14) -> None:
    """Compile everything; exit with 1 if something does not compile."""
    device = Device.of(torch.device("cuda", torch.cuda.current_device()))
    start, count = time.monotonic(), len(launches(device))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(precompile, number, device) for number in range(count)]
        failed = []
        for done, future in enumerate(as_completed(futures), 1):
            if (reason := future.result()) is not None:
                failed.append(reason)
            if done % 20 == 0 or done == count:
                # A log that is read after the part was stopped says how far it came.
                print(f"{done} of {count} after {time.monotonic() - start:.0f} s", flush=True)
    for reason in failed:
        print(reason)
    raise typer.Exit(int(bool(failed)))


if __name__ == "__main__":
    typer.run(main)

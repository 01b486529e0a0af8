"""The time of each kernel of a call, from PyTorch's profiler, beside what was predicted for it.

    python bench/gpu/gpu_launches.py [--device cpu]
    python bench/gpu/gpu_launches.py --once --stage 1 --operator gated_aggregation --backend cuda    what ncu watches

Rows in bench/results/<device>/kernels.json, one for each kernel of each operator, stage and backend, and one of their
sum, with the error of the performance model's prediction where there is one for this kind of GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from gpu_kernels import Case, ours
from torch.profiler import ProfilerActivity, profile

from focalnet.backends.gpu_order import device_class
from focalnet.benchmark.environment import facts
from focalnet.benchmark.floors import OPERATORS, stages
from focalnet.benchmark.operators import able_backends
from focalnet.benchmark.rows import NOWHERE, read, write

CALLS = 5


def kernel_seconds(call: Callable[[], object], device: str) -> dict[str, tuple[float, float]]:
    """{kernel: (seconds of one call, launches of one call)}; on a CPU PyTorch's operators stand for kernels."""
    call()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if microseconds:
            found[short(event.key)][0] += 1e-6 * microseconds / CALLS
            found[short(event.key)][1] += event.count / CALLS
    return {name: (seconds, launches) for name, (seconds, launches) in found.items()}


def short(name: str) -> str:
    """A kernel's name without template arguments and parameters."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1] or name


def predicted() -> dict[tuple, float]:
    """Microseconds by (operator, variant, stage, batch, dtype, backend, kernel), for this kind of GPU."""
    kind = device_class(torch.cuda.get_device_capability())
    return {
        _key(row, row.get("backend") or "triton", row["subject"]): row["predicted_us"]
        for file in ("predicted", "predicted_cuda")
        for row in read(file, NOWHERE)
        if row["x"] == kind
    }


def _key(row: dict, backend: str, kernel: str) -> tuple:
    return (*(row[name] for name in ("operator", "variant", "stage", "batch", "dtype")), backend, kernel)


def rows_of(case: Case, backend: str, expected: dict[tuple, float]) -> list[dict]:
    """A row for each kernel, and one for all of them."""
    found = kernel_seconds(ours(case, backend), case.device)
    found["all"] = sum(seconds for seconds, _ in found.values()), sum(launches for _, launches in found.values())
    head = {
        "case": "launches",
        "operator": case.operator,
        "variant": case.stage.variant,
        "stage": case.stage.index + 1,
    }
    head |= {"batch": case.batch, "dtype": str(case.dtype).removeprefix("torch."), "backend": backend}
    rows = []
    for kernel, (seconds, launches) in found.items():
        row = head | {"subject": kernel, "measured_us": round(1e6 * seconds, 2), "launches": launches}
        prediction = expected.get(_key(head, backend, kernel))
        if prediction is not None:
            row |= {"predicted_us": prediction, "predicted_over_measured": prediction / max(row["measured_us"], 1e-3)}
        rows.append(row)
    return rows


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    stage: Annotated[list[int] | None, typer.Option(help="Stages, from 1; all.")] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Operators; all.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backends; all that run here.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Run each call twice, measure and write nothing.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
) -> None:
    """Measure, print a line for each kernel, and write the rows of each call as soon as they are known."""
    environment = facts(device)
    expected = predicted() if device == "cuda" else {}
    names = backend or [name for name in able_backends(device) if name != "reference"]
    for one in stages(variant):
        if stage and one.index + 1 not in stage:
            continue
        for name in operator or OPERATORS:
            for chosen in names:
                case = Case(name, one, batch, getattr(torch, dtype), device)
                if once:
                    call = ours(case, chosen)
                    for _ in range(2):
                        call()
                    continue
                rows = rows_of(case, chosen, expected)
                show(rows)
                if device == "cuda":
                    write([row | environment for row in rows], "kernels", str(environment["device"]))


def show(rows: list[dict]) -> None:
    for row in rows:
        prediction = f", predicted {row['predicted_us']:.1f}" if "predicted_us" in row else ""
        where = f"{row['operator']}, stage {row['stage']}, {row['backend']}"
        print(f"{where}: {row['subject']}: {row['measured_us']:.1f} us{prediction}", flush=True)


if __name__ == "__main__":
    typer.run(main)

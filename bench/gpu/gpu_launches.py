"""The time of each kernel of a call, from PyTorch's profiler, beside what was predicted for it.

    python bench/gpu/gpu_launches.py [--device cpu]
    python bench/gpu/gpu_launches.py --once --stage 1 --operator gated_aggregation      what ncu watches

Rows in bench/results/<device>/kernels.json, one for each kernel of each operator, stage and backend, and one of their
sum, with the error of the performance model's prediction where there is one for this kind of GPU.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
import typer
from gpu_kernels import Case, ours
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from focalnet.backends.gpu_order import device_class
from focalnet.benchmark.environment import facts
from focalnet.benchmark.floors import OPERATORS, stages
from focalnet.benchmark.operators import able_backends
from focalnet.benchmark.rows import NOWHERE, read, write

CALLS = 5
# What a call of `--once` is announced with, and the kernel that stands before its kernels.
ONCE, MARKER = "call of ", "spin_kernel"
# Before the name of a call in the profiler.
MARK = "call: "


def kernel_seconds(calls: dict[str, Callable[[], object]], device: str) -> dict[str, dict[str, tuple[float, float]]]:
    """{name of a call: {kernel: (seconds of one call, launches of one call)}}, all in one session of the profiler.

    A session costs a second or two. Calls are told apart by the ranges that they are made in, whose launches the
    profiler ties to the kernels. On a CPU PyTorch's operators stand for kernels.
    """
    for call in calls.values():
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for name, call in calls.items():
            with record_function(MARK + name):
                for _ in range(CALLS):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
    return by_call(profiler.events(), device)


def by_call(events: Iterable[Any], device: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Kernels by the range, of one thread and waited for at its end, in whose time they ran."""
    events = list(events)
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [event for event in on_cpu if event.name.startswith(MARK)]
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    # Ranges of the CPU appear on the device once more, around their kernels.
    repeated = {event.name for event in on_cpu} if device == "cuda" else set()
    found: dict[str, dict[str, list[float]]] = {event.name.removeprefix(MARK): {} for event in ranges}
    for event in events:
        if event.device_type != wanted or event.name.startswith(MARK) or event.name in repeated:
            continue
        microseconds = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        middle = (event.time_range.start + event.time_range.end) / 2
        inside = next((r for r in ranges if r.time_range.start <= middle <= r.time_range.end), None)
        if inside is not None and microseconds:
            sums = found[inside.name.removeprefix(MARK)].setdefault(short(event.name), [0.0, 0.0])
            sums[0] += 1e-6 * microseconds / CALLS
            sums[1] += 1 / CALLS
    return {name: {kernel: (s, n) for kernel, (s, n) in kernels.items()} for name, kernels in found.items()}


def short(name: str) -> str:
    """A kernel's name without its type, namespaces, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.split("<")[0].split("(")[0].split("::")[-1].strip() or name


def predicted(kind: str | None = None) -> dict[tuple, float]:
    """Microseconds by (operator, variant, stage, batch, dtype, backend, kernel), for this ``kind`` of GPU.

    Kernels around an aggregation's are those of focal modulation too.
    """
    kind = kind or device_class(torch.cuda.get_device_capability())
    found: dict[tuple, float] = defaultdict(float)
    for row in [*read("predicted", NOWHERE), *read("predicted_cuda", NOWHERE)]:
        if row["x"] != kind:
            continue
        # "3 sum_partials_kernel<bfloat16>" is the third launch: launches of one kernel are a sum, as when measured.
        kernel = short(row["subject"].lstrip("0123456789 "))
        for operator in _operators_with(row, kernel):
            found[_key(row | {"operator": operator}, row.get("backend") or "triton", kernel)] += row["predicted_us"]
    return dict(found)


def _operators_with(row: dict, kernel: str) -> list[str]:
    """The operator, and focal modulation where `cuda` runs the same kernel for it: its rows are of aggregations."""
    operator = row["operator"]
    shared = row.get("backend") == "cuda" and kernel.startswith("toeplitz")
    return [operator, *([operator.replace("gated_aggregation", "focal_modulation")] if shared else [])]


def _key(row: dict, backend: str, kernel: str) -> tuple:
    return (*(row[name] for name in ("operator", "variant", "stage", "batch", "dtype")), backend, kernel)


def rows_of(
    case: Case, backend: str, found: dict[str, tuple[float, float]], expected: dict[tuple, float]
) -> list[dict]:
    """A row for each kernel of a call, and one for all of them."""
    found = found | {"all": (sum(s for s, _ in found.values()), sum(launches for _, launches in found.values()))}
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
    once: Annotated[
        bool, typer.Option("--once", help="Run each call once for ncu, measure and write nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
) -> None:
    """Measure, print a line for each kernel, and write the rows of each call as soon as they are known."""
    environment = facts(device)
    expected = predicted() if device == "cuda" else {}
    names = backend or [name for name in able_backends(device) if name != "reference"]
    waiting: dict[str, Callable[[], object]] = {}
    for one in stages(variant):
        if stage and one.index + 1 not in stage:
            continue
        cases = {
            f"{name}, {chosen}": (Case(name, one, batch, getattr(torch, dtype), device), chosen)
            for name, chosen in itertools.product(operator or OPERATORS, names)
        }
        if once:
            waiting |= {
                f"{case.operator}, stage {one.index + 1}, {name}": ours(case, name) for case, name in cases.values()
            }
            continue
        start = time.monotonic()
        found = kernel_seconds({name: ours(*case) for name, case in cases.items()}, device)
        for name, case in cases.items():
            rows = rows_of(*case, found[name], expected)
            show(rows)
            if device == "cuda":
                write([row | environment for row in rows], "kernels", str(environment["device"]))
        print(f"stage {one.index + 1}: {time.monotonic() - start:.1f} s", flush=True)
    if once:
        run_once(waiting)


def run_once(calls: dict[str, Callable[[], object]]) -> None:
    """Each call once where a profiler watches, after a first one that compiles and fills caches."""
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for name, call in calls.items():
        print(f"{ONCE}{name}", flush=True)
        torch.cuda._sleep(1)  # launches MARKER
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def show(rows: list[dict]) -> None:
    for row in rows:
        prediction = f", predicted {row['predicted_us']:.1f}" if "predicted_us" in row else ""
        where = f"{row['operator']}, stage {row['stage']}, {row['backend']}"
        print(f"{where}: {row['subject']}: {row['measured_us']:.1f} us{prediction}", flush=True)


if __name__ == "__main__":
    typer.run(main)

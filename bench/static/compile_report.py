"""Reports registers, local and shared memory of every configuration of the Triton kernels, compiled without a GPU.

    python bench/static/compile_report.py [--arch 90] [--minutes 15]

Takes what all_launches.py lists, two at a time, kernels with few taps first (``--kernel`` names some). A row of the
same source stays, and so does one of another source that lowers to the same Triton IR (lowered.py) under the same
Triton: the report can be made in several sittings, and cutting or naming a kernel anew costs seconds a row. A row of
nothing that is listed goes. Rows go to bench/results/without-gpu/compiled.json, under another Triton than the newest
to a file of its own, such as compiled-triton-3.6.json:

    pip download triton==3.6.0 --no-deps && pip install --no-deps --target FOLDER triton-3.6.0-*.whl
    PYTHONPATH=FOLDER python bench/static/compile_report.py --arch 90 --dtype bfloat16

It exits with an error when a kernel spills, wants more shared memory than there is, or a barrier moved.
"""

from __future__ import annotations

import functools
import hashlib
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from typing import Annotated

import torch
import triton
import triton.language as tl
import typer
from all_launches import DEVICES, DTYPES, arguments_of, launches
from barriers import moved
from compiled import Resources, compile_launch, resources
from focalnet.kernels.plan import Launch
from lowered import digest
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.runtime.jit import JITCallable

from focalnet.benchmark.environment import versions
from focalnet.benchmark.rows import NOWHERE, keep_only, key, read, write

console = Console()
NEWEST = "3.9"
OF_TRITON = ".".join(triton.__version__.split(".")[:2])
KIND = "compiled" if OF_TRITON == NEWEST else f"compiled-triton-{OF_TRITON}"


def main(
    arch: Annotated[list[int], typer.Option(help="80, 86, 89, 90, 100, 120; all.")] = [*DEVICES],  # noqa: B006
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; all.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Names of kernels; all.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop starting new ones after so long.")] = 1e9,
    processes: Annotated[int, typer.Option(help="Compilers at once.")] = 2,
) -> None:
    """Compile what is missing, write the rows, and list what does not hold."""
    dtypes = tuple(getattr(torch, name) for name in dtype) if dtype else DTYPES
    have = {key(row): row for row in read(KIND, NOWHERE)}
    wanted = [
        (head, (one, (dtype,), name, have.get(key(head), {})))
        for large in (False, True)
        for one in arch
        for dtype in dtypes
        for name, (launch, types) in launches(one, (dtype,)).items()
        if is_large(launch) == large
        and (not kernel or launch.name in kernel)
        and have.get(key(head := head_of(one, launch, types)), {}).get("source") != source(launch)
    ]
    console.print(f"{len(wanted)} to compile")
    end = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compiled, *task, end): head for head, task in wanted}
        for future in track(as_completed(futures), "compiling", len(futures), console=Console(stderr=True)):
            if (figures := future.result()) is not None:
                write([futures[future] | figures | versions() | {"triton": triton.__version__}], KIND, NOWHERE)
    listed = {key(head_of(one, *found)) for one in DEVICES for found in launches(one).values()}
    keep_only(listed, KIND, NOWHERE)
    rows = [row for row in read(KIND, NOWHERE) if row["arch"] in arch]
    show(rows)
    if any(row["against"] for row in rows):
        raise typer.Exit(1)


def is_large(launch: Launch) -> bool:
    """Of a detector with kernels up to 15. They take longest and nobody published one, so they come last."""
    return max(launch.constexprs.get("KH", (0,))) > 9


def head_of(arch: int, launch: Launch, types: dict[str, torch.dtype]) -> dict:
    constants = ", ".join(f"{name}={value}" for name, value in launch.constexprs.items())
    dtypes = ", ".join(str(types[v]).removeprefix("torch.") for v in launch.arguments.values() if isinstance(v, str))
    return {
        "case": "compiled",
        "operator": launch.name,
        "subject": constants,
        "x": arch,
        "dtype": dtypes,
        "series": f"{launch.num_warps} warps, {launch.num_stages} stages",
    }


def source(launch: Launch) -> str:
    """Changes whenever the text of the kernel or of a device function it may call, or its bound of registers, does."""
    found = device_functions(launch.kernel)
    texts = [*(found[name] for name in sorted(found)), str(launch.maxnreg or "")]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def device_functions(kernel: JITCallable, found: dict[str, str] | None = None) -> dict[str, str]:
    """The text of ``kernel``, of the functions and the constants that it names, by name.

    Triton's own key also holds the line where each stands.
    """
    found = {} if found is None else found
    if kernel.fn.__qualname__ not in found:
        found[kernel.fn.__qualname__] = kernel.src
        for name in kernel.fn.__code__.co_names:
            named = kernel.fn.__globals__.get(name)
            if isinstance(named, JITCallable):
                device_functions(named, found)
            elif isinstance(named, tl.constexpr):
                found[name] = f"{name} = {named.value}"
    return found


_launches = functools.cache(launches)


def compiled(arch: int, dtypes: tuple[torch.dtype, ...], name: tuple, row: dict, end: float) -> dict | None:
    """The figures of a row; None when time is up. Runs in a process of the pool, which no kernel can be sent to."""
    if time.monotonic() > end:
        return None
    warnings.simplefilter("ignore")
    launch, types = _launches(arch, dtypes)[name]
    return figures(launch, types, arch, row)


def figures(launch: Launch, types: dict[str, torch.dtype], arch: int, row: dict) -> dict:
    """What the compiled launch uses and what speaks against it; those of ``row``, if it stands for the same IR."""
    arguments = arguments_of(launch, types)
    ir = digest(launch.kernel, arguments, launch.options, arch)
    if row.get("ir") == ir and row["triton"] == triton.__version__:
        return {name: row[name] for name in ("against", *Resources.__dataclass_fields__)} | {
            "ir": ir,
            "source": source(launch),
        }
    made = compile_launch(launch.kernel, arguments, launch.options, arch)
    found = resources(made, arch)
    against = [reason for reason in (found.why_not(), *moved(made)) if reason]
    return {**asdict(found), "against": against, "ir": ir, "source": source(launch)}


def show(rows: list[dict]) -> None:
    table = Table(title=f"compiled without a GPU by triton {triton.__version__}: most of each")
    for column in ("kernel", "sm"):
        table.add_column(column, no_wrap=True)
    for column in ("rows", "regs", "local", "shared", "KB"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    for (kernel, arch), of_one in sorted(groups.items()):
        most = {name: max(row[name] for row in of_one) for name in ("registers", "local", "shared", "code")}
        code = most.pop("code") // 1024
        table.add_row(kernel, str(arch), str(len(of_one)), *map(str, most.values()), str(code))
    console.print(table)
    for row in rows:
        for reason in row["against"]:
            console.print(f"{row['kernel']}, sm_{row['arch']}, {row['subject']}: {reason}", style="red")


if __name__ == "__main__":
    typer.run(main)

"""Reports registers, local and shared memory of the kernels of a block's residual branches, compiled without a GPU.

    python bench/static/compile_residual.py [--arch 90]

It covers all 15 published variants in three dtypes and under autocast, with and without stochastic depth. As in
all_launches.py, launches that differ only in the number of channels are compiled once. The rows go to
bench/results/without-gpu/compile_residual.json. The exit code is an error if a kernel spills.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch
import typer
from all_launches import COMPLETE, DEVICES, DTYPES, key_of
from bytes_moved import NOWHERE
from compile_report import figures, head_of, source
from focalnet.kernels.plan import Launch, Plan
from residual_bytes import ends, plans
from rich.console import Console
from rich.progress import track

from focalnet.benchmark.environment import versions
from focalnet.benchmark.rows import key, read, write
from focalnet.variants import VARIANTS

FILE = "compile_residual"
# (dtype of the stream, autocast's dtype)
TYPES = (*((dtype, None) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16))


def launches(arch: int) -> dict[tuple, tuple[Launch, dict]]:
    """Launches by what decides the compiled code, with the dtypes of their tensors."""
    found: dict[tuple, tuple[Launch, dict]] = {}
    for dtype, lower in TYPES:
        for plan in _plans(arch, dtype, lower):
            types = plan.dtype_of()
            for launch in plan.launches:
                found.setdefault(key_of(launch, types), (launch, types))
    return found


def _plans(arch: int, dtype: torch.dtype, lower: torch.dtype | None) -> Iterator[Plan]:
    found = (end for name in VARIANTS for end in ends(name, 128, dtype))
    # The map does not matter, and many variants have the same channels.
    unlike = {(end.part, end.stage.channels, end.training, end.layer_scale): end for end in found}
    for end in unlike.values():
        # The first block of a model has no stochastic depth in training either.
        for drops in sorted({end.drops, False}):
            yield from filter(None, plans(replace(end, drops=drops), DEVICES[arch], lower))


def main(
    arch: Annotated[list[int], typer.Option(help="80, 90, 100.")] = [*COMPLETE],  # noqa: B006
) -> None:
    """Compile what is missing and write the rows."""
    warnings.simplefilter("ignore")
    have = {key(row): row for row in read(FILE, NOWHERE)}
    wanted = [(one, launch, types) for one in arch for launch, types in launches(one).values()]
    for one, launch, types in track(wanted, "compiling", console=Console(stderr=True)):
        head = head_of(one, launch, types)
        if have.get(key(head), {}).get("source") == source(launch):
            continue
        row = head | figures(launch, types, one, have.get(key(head), {})) | versions()
        have[key(row)] = row
        if len(have) % 50 == 0:
            write(list(have.values()), FILE, NOWHERE)
    write(list(have.values()), FILE, NOWHERE)
    against = [row for row in have.values() if row["against"]]
    most = max(row["registers"] for row in have.values())
    Console().print(
        f"{len(have)} configurations, at most {most} registers, {len(against)} with something against them"
    )
    if against:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Inference at batch 1, call by call and as the replay of a CUDA graph, which leaves the host's time out.

    python bench/gpu/gpu_replay.py [--device cpu]

Ours and transformers'. Rows in bench/results/<device>/models.json, written model by model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer

from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import RUNTIMES, Case
from focalnet.benchmark.timing import measure

NAMES = ("focalnet", "transformers")


def replayed(run: Callable[[torch.Tensor], object], images: torch.Tensor) -> Callable[[int], object]:
    """A call that replays what one call of ``run`` launches."""
    # On a stream of its own first: libraries and autotuning set up what a capture forbids.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(images)
    return lambda number: graph.replay()


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    size: Annotated[int, typer.Option(help="Image size in pixels.")] = 224,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Measured blocks of calls of each.")] = 11,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script, without replay.")] = "cuda",
) -> None:
    """Measure, print a line for each row, and write the rows."""
    environment, case = facts(device), Case(variant, size, 1, device=device, dtype=dtype)
    for name in NAMES:
        run, images = RUNTIMES[name](case), case.images(0)
        calls: dict[str, Callable[[int], object]] = {name: lambda number, run=run, images=images: run(images)}
        if device == "cuda":
            calls[f"{name}, replayed"] = replayed(run, images)
        rows = []
        for runtime, timing in measure(calls, device, rounds).items():
            row = {"case": "batch 1", "variant": variant, "size": size, "batch": 1, "dtype": dtype, "runtime": runtime}
            print(f"{runtime}: {1e3 * timing.row()['median_s']:.3f} ms", flush=True)
            rows.append(row | timing.row() | environment)
        if device == "cuda":
            write(rows, "models", str(environment["device"]))


if __name__ == "__main__":
    typer.run(main)

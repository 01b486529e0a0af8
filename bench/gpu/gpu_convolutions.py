"""cuDNN's depthwise convolutions at the sizes of each stage: forward, and the gradients of input and weight.

    python bench/gpu/gpu_convolutions.py [--device cpu]

What PyTorch runs for the reference, in channels-last memory. Rows in bench/results/<device>/kernels.json, written
stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from focalnet.benchmark.environment import facts
from focalnet.benchmark.floors import Stage, stages
from focalnet.benchmark.rows import write
from focalnet.benchmark.timing import copies_past_cache, measure


def calls(
    stage: Stage, kernel: int, batch: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[int], object]]:
    """Forward and both gradients, on copies taken in turn so that no input is in a cache."""
    channels, size = stage.channels, (batch, stage.channels, stage.height, stage.width)
    copies = copies_past_cache(2 * batch * channels * stage.height * stage.width * dtype.itemsize, device)

    def image() -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    inputs, gradients = [image() for _ in range(copies)], [image() for _ in range(copies)]
    weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=dtype)

    def forward(number: int) -> object:
        return F.conv2d(inputs[number % copies], weight, padding=kernel // 2, groups=channels)

    def backward(number: int, mask: list[bool]) -> object:
        one = number % copies
        settings = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], channels)
        return torch.ops.aten.convolution_backward(gradients[one], inputs[one], weight, None, *settings, mask)

    return {
        "convolution": forward,
        "convolution, d input": lambda number: backward(number, [True, False, False]),
        "convolution, d weight": lambda number: backward(number, [False, True, False]),
    }


def main(
    variant: Annotated[str, typer.Option(help="A published variant.")] = "tiny_lrf",
    batch: Annotated[int, typer.Option(help="Images.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Measured blocks of calls of each.")] = 5,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
) -> None:
    """Measure, print a line for each row, and write the rows."""
    environment = facts(device)
    torch.backends.cudnn.benchmark = True
    for stage in stages(variant):
        rows = []
        for kernel in stage.kernels:
            made = calls(stage, kernel, batch, getattr(torch, dtype), device)
            for name, timing in measure(made, device, rounds).items():
                row = {"case": "convolution", "operator": name, "subject": f"{kernel}x{kernel}", "variant": variant}
                row |= {"stage": stage.index + 1, "batch": batch, "dtype": dtype, "runtime": "cuDNN", **timing.row()}
                print(
                    f"stage {stage.index + 1}, {kernel}x{kernel}, {name}: {1e6 * row['median_s']:.1f} us", flush=True
                )
                rows.append(row | environment)
        if device == "cuda":
            write(rows, "kernels", str(environment["device"]))


if __name__ == "__main__":
    typer.run(main)

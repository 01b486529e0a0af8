"""Compares the cost of an image in FocalNet-T with Swin-T, ConvNeXt-T and ViT-S, networks of about the same size.

    python bench/architectures.py [--batch 8] [--train] [--device cuda --dtype bfloat16]     2 minutes on two cores

FocalNet is measured in focalnet and in transformers, the other networks in transformers. The rows go to
bench/results/<device>/architectures.json.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from models import compared, console

from focalnet.benchmark import tables
from focalnet.benchmark.architectures import MODELS
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import Case, MakeModel, flops_per_image, theirs


def main(
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each network; use more on a noisy machine.")] = 7,
    train: Annotated[bool, typer.Option(help="Measure a training step instead of inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Compare the networks, print a table for each batch, and write the rows."""
    environment = facts(device)
    makes = {"focalnet": theirs, "transformers": theirs, **MODELS}
    for case in (Case("tiny_lrf", size, b, train, device, dtype) for b in batch):
        sizes = {name: size_of(case, make) for name, make in makes.items()}
        rows = [row | sizes[row["runtime"]] | environment for row in compared(case, list(makes), rounds)]
        if rows:
            console.print(tables.of_runtimes(case, rows))
            write(rows, "architectures", environment["device"])


def size_of(case: Case, make: MakeModel) -> dict[str, int]:
    """The parameters and FLOPs of a network. A multiply-add is two FLOPs, a training step three forward passes."""
    with torch.device("meta"):
        model = make(Case(case.variant, case.size, 1, device="meta"))
    flops = case.batch * flops_per_image(case, make) * (3 if case.training else 1)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "flops": flops}


if __name__ == "__main__":
    typer.run(main)

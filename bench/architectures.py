"""FocalNet-T beside Swin-T, ConvNeXt-T and ViT-S, which have about its size: what an image costs.

    python bench/architectures.py [--batch 8] [--train] [--device cuda --dtype bfloat16]

The others run as transformers ships them, FocalNet by focalnet and by transformers. The rows go to
bench/results/<device>/architectures.json.
"""

from __future__ import annotations

from typing import Annotated

import typer
from models import compared, console
from rows import write

from focalnet.benchmark import tables
from focalnet.benchmark.architectures import ARCHITECTURES
from focalnet.benchmark.environment import facts
from focalnet.benchmark.runtimes import Case


def main(
    batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006
    size: Annotated[int, typer.Option(help="Image size.")] = 224,
    rounds: Annotated[int, typer.Option(help="Runs of each.")] = 9,
    train: Annotated[bool, typer.Option(help="A training step instead of inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Compare the networks, print a table for each batch, and write the rows."""
    environment = facts(device)
    for case in (Case("tiny_lrf", size, b, train, device, dtype) for b in batch):
        rows = [row | environment for row in compared(case, ["focalnet", "transformers", *ARCHITECTURES], rounds)]
        console.print(tables.of_runtimes(case, rows))
        write(rows, "architectures", environment["device"])


if __name__ == "__main__":
    typer.run(main)

"""What int8 would give: accuracy of the digits model after quantisation by NNCF. Times are in bench/models.py.

    pip install nncf
    python bench/int8.py [--write]
    python bench/models.py --batch 1 --runtime focalnet --runtime "openvino, default" --runtime "openvino, int8"

Post-training quantisation of weights and activations, calibrated on digits that the model was trained on. Compared on
the held-out fifth: accuracy in float32, bfloat16 (ours) and int8, how often int8 agrees with float32, and the largest
difference of a logit relative to the largest logit. With --write the row goes to bench/results/<device>/int8.json.
Half a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor

from focalnet import FocalNetForImageClassification
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.benchmark.runtimes import openvino_model
from focalnet.cli.training import reader
from focalnet.pretrained import shipped
from focalnet.training.checking import image_of
from focalnet.training.sources import load_source

CALIBRATION = 256
console = Console()


def main(keep: Annotated[bool, typer.Option("--write", help="Put the row among the committed ones.")] = False) -> None:
    """Measure, print, and with --write keep the row."""
    folder = shipped("digits")
    assert folder is not None
    source = load_source("digits", reader(), labelled=True)
    assert source.held_out is not None
    pixels, labels = preprocessed(folder, source.held_out)
    model = FocalNetForImageClassification.from_pretrained(folder).eval()
    run = quantised(model, preprocessed(folder, source.train.select(range(CALIBRATION)))[0])
    with torch.inference_mode():
        exact = model(pixels).logits
        halves = model.bfloat16()(pixels).logits.float()
    row = agreement(exact, {"bfloat16": halves, "int8": run(pixels)}, labels)
    console.print(row)
    if keep:
        environment = facts("cpu")
        write([{"case": "int8", "subject": "digits", **row, **environment}], "int8", environment["device"])


def preprocessed(folder: Path, table: Any) -> tuple[Tensor, Tensor]:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [image_of(cell, reader()) for cell in table["image"]]
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(table["label"][:])


def quantised(model: torch.nn.Module, calibration: Tensor) -> Callable[[Tensor], Tensor]:
    """``model`` in int8, images (B, 3, H, W) -> logits; calibrated image by image."""
    import nncf
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.onnx")
        program = torch.onnx.export(
            _Logits(model).eval(),
            (calibration[:2],),
            input_names=["images"],
            dynamic_shapes=[{0: torch.export.Dim("batch")}],
            dynamo=True,
            verbose=False,
        )
        program.save(path, external_data=False)
        batches = nncf.Dataset([{"images": image[None].numpy()} for image in calibration])
        read = ov.Core().read_model(path)
        run = openvino_model(nncf.quantize(read, batches, subset_size=len(calibration)), None)
    return lambda images: torch.from_numpy(run(images)[0].copy())


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, return_dict=False)[0]


def agreement(exact: Tensor, others: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies; and of each other: how often its answer is that of float32, and its largest relative error."""
    share = lambda right: right.double().mean().item()  # noqa: E731
    row: dict[str, float] = {"images": len(labels), "float32_accuracy": share(exact.argmax(-1) == labels)}
    for name, logits in others.items():
        row[f"{name}_accuracy"] = share(logits.argmax(-1) == labels)
        row[f"{name}_agrees"] = share(logits.argmax(-1) == exact.argmax(-1))
        row[f"{name}_largest_error"] = ((logits - exact).abs().max() / exact.abs().max()).item()
    return row


if __name__ == "__main__":
    typer.run(main)

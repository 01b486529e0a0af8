"""Classify one photograph with transformers' FocalNet and with this one: same weights, same answer.

``make demo`` runs this. The exit code is 1 if the two answers differ by more than rounding.
"""

import os
import statistics
import sys
import tempfile
import time

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data
from transformers import AutoImageProcessor
from transformers import FocalNetForImageClassification as TransformersFocalNet

from focalnet import FocalNetConfig, FocalNetForImageClassification
from focalnet.cli.images import published_processor
from focalnet.cli.info import automatic_backend
from focalnet.cli.models import silence_transformers, stay_offline_unless_reachable

PUBLISHED = "microsoft/focalnet-tiny-lrf"
SECONDS = 6
TOLERANCE = 1e-5  # of the largest logit: float32 rounding, summed in another order

console = Console(highlight=False)


def main() -> int:
    silence_transformers()
    with tempfile.TemporaryDirectory() as folder:
        source = find_weights(folder)
        theirs = TransformersFocalNet.from_pretrained(source).eval()
        ours = FocalNetForImageClassification.from_pretrained(source).eval()
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    photograph = Image.fromarray(data.chelsea())
    pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
    console.print(f"The photograph: a cat, {photograph.width} x {photograph.height}, from scikit-image.\n")

    (their_logits, our_logits), times = race([theirs, ours], pixel_values)
    console.print(side_by_side(their_logits, our_logits, theirs.config.id2label))

    difference = (our_logits - their_logits).abs().max().item()
    largest = their_logits.abs().max().item()
    equal = difference <= TOLERANCE * largest
    backend = os.environ.get("FOCALNET_BACKEND") or automatic_backend("cpu")
    console.print(facts(difference, largest, times, backend))
    if not equal:
        console.print(f"[bold red]The two differ by more than {TOLERANCE:g} of the largest logit.[/]")
        return 1
    console.print("\nThe line to change in your code:\n")
    console.print("  [red]- from transformers import FocalNetForImageClassification[/]", soft_wrap=True)
    console.print("  [green]+ from focalnet import FocalNetForImageClassification[/]", soft_wrap=True)
    return 0


def find_weights(folder: str) -> str:
    """The name of the published weights if they are available, else ``folder``, with random weights written to it."""
    stay_offline_unless_reachable()
    try:
        AutoImageProcessor.from_pretrained(PUBLISHED, backend="pil")
        TransformersFocalNet.from_pretrained(PUBLISHED)
    except OSError:
        config = FocalNetConfig.from_variant("tiny_lrf")
        torch.manual_seed(0)
        FocalNetForImageClassification(config).save_pretrained(folder)
        published_processor(config).save_pretrained(folder)
        console.print(
            f"[yellow]{PUBLISHED} is not in the cache and cannot be downloaded.\n"
            "Both models get the same random weights instead (seed 0, same architecture). The\n"
            "labels have no names and mean nothing, but the two models must still agree.[/]\n"
        )
        return folder
    console.print(f"Weights: {PUBLISHED}, as published.\n")
    return PUBLISHED


def race(models: list, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[list[float]]]:
    """The logits, and the seconds of each run. The models take turns, after one warm-up run each."""
    times = [[] for _ in models]
    end = time.perf_counter() + SECONDS
    with torch.inference_mode():
        logits = [model(pixel_values).logits[0] for model in models]
        while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 21):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(pixel_values)
                taken.append(time.perf_counter() - start)
    return logits, times


def side_by_side(their_logits: torch.Tensor, our_logits: torch.Tensor, id2label: dict[int, str]) -> Table:
    table = Table(title="top 5", title_justify="left", title_style="bold")
    for name in ("transformers", "focalnet"):
        table.add_column(name, overflow="fold", max_width=32)
        table.add_column("", justify="right")
    columns = [logits.softmax(-1).topk(5) for logits in (their_logits, our_logits)]
    for rank in range(5):
        row = []
        for values, indices in columns:
            row += [id2label[indices[rank].item()], f"{values[rank].item():.3%}"]
        table.add_row(*row)
    return table


def facts(difference: float, largest: float, times: list[list[float]], backend: str) -> Table:
    theirs, ours = (f"{statistics.median(taken) * 1e3:.1f} ms" for taken in times)
    threads = torch.get_num_threads()
    table = Table(show_header=False)
    table.add_row("largest difference", f"{difference:.1e} between logits of up to {largest:.3g}")
    table.add_row("relative", f"{difference / largest:.1e}, allowed {TOLERANCE:g}")
    table.add_row("time, transformers", theirs)
    table.add_row("time, focalnet", f"{ours} on backend {backend}")
    table.add_row("", f"one image, float32, CPU, {threads} thread(s), median of {len(times[0])} runs")
    return table


if __name__ == "__main__":
    sys.exit(main())

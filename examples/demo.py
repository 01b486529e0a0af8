"""Handwritten digits and a photograph, with transformers' FocalNet and with this one: same weights, same answers.

``make demo`` runs this. The model inside the package was not trained on these digits, so its labels mean something,
even without network. The exit code is 1 if the answers of the two differ by more than rounding.
"""

import io
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
from focalnet.cli.training import reader
from focalnet.pretrained import shipped
from focalnet.training.sources import load_source

PUBLISHED = "microsoft/focalnet-tiny-lrf"
SECONDS = 6
PAGE = 16  # digits
TOLERANCE = 1e-5  # of the largest logit: float32 rounding, summed in another order

console = Console(highlight=False)


def main() -> int:
    silence_transformers()
    digits_agree = digits()
    with tempfile.TemporaryDirectory() as folder:
        source = find_weights(folder)
        theirs = TransformersFocalNet.from_pretrained(source).eval()
        ours = FocalNetForImageClassification.from_pretrained(source).eval()
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    photograph = Image.fromarray(data.chelsea())
    pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
    console.print(f"The photograph: a cat, {photograph.width} x {photograph.height}, from scikit-image.\n")

    ((their_logits,), (our_logits,)), times = race([theirs, ours], pixel_values)
    console.print(side_by_side(their_logits, our_logits, theirs.config.id2label))

    difference = (our_logits - their_logits).abs().max().item()
    largest = their_logits.abs().max().item()
    equal = difference <= TOLERANCE * largest
    backend = os.environ.get("FOCALNET_BACKEND") or automatic_backend("cpu")
    console.print(facts(difference, largest, times, backend))
    if not (equal and digits_agree):
        console.print(f"[bold red]The two differ by more than {TOLERANCE:g} of the largest logit.[/]")
        return 1
    console.print("\nThe line to change in your code:\n")
    console.print("  [red]- from transformers import FocalNetForImageClassification[/]", soft_wrap=True)
    console.print("  [green]+ from focalnet import FocalNetForImageClassification[/]", soft_wrap=True)
    return 0


def digits() -> bool:
    """A page of held-out digits as both models read them, and their accuracy on all; whether the two agree."""
    folder = shipped("digits")
    table = load_source("digits", reader(), labelled=True).held_out
    theirs = TransformersFocalNet.from_pretrained(folder).eval()
    ours = FocalNetForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    scans = [Image.open(io.BytesIO(cell["bytes"])) for cell in table["image"]]
    pixel_values = processor([scan.convert("RGB") for scan in scans], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(table["label"])

    logits, times = race([theirs, ours], pixel_values)
    read = [one.argmax(-1) for one in logits]
    console.print(f"{len(scans)} digits of scikit-learn that the model in this package was not trained on;")
    console.print("some of them, each with what transformers | focalnet read in it:\n")
    console.print(page(scans, read))
    table = Table(show_header=True)
    for heading in ("", "transformers", "focalnet"):
        table.add_column(heading)
    table.add_row("accuracy", *(f"{(one == labels).double().mean().item():.2%}" for one in read))
    table.add_row("errors", *(f"{(one != labels).sum().item()} of {len(labels)}" for one in read))
    table.add_row("time for all", *(f"{statistics.median(taken) * 1e3:.1f} ms" for taken in times))
    console.print(table)
    console.print()
    difference, largest = (logits[1] - logits[0]).abs().max().item(), logits[0].abs().max().item()
    return difference <= TOLERANCE * largest


def page(scans: list[Image.Image], read: list[torch.Tensor]) -> str:
    """Every so many of the scans in rows of eight, two pixels a character."""
    chosen = range(0, len(scans), len(scans) // PAGE)[:PAGE]
    lines = []
    for start in range(0, PAGE, 8):
        row = chosen[start : start + 8]
        drawn = [draw(scans[index]) for index in row]
        lines += [" ".join(one[line] for one in drawn) for line in range(len(drawn[0]))]
        lines += [" ".join(f"{read[0][index]} | {read[1][index]}".center(8) for index in row), ""]
    return "\n".join(lines)


def draw(scan: Image.Image) -> list[str]:
    dark = [[scan.getpixel((x, y)) > 100 for x in range(scan.width)] for y in range(scan.height)]
    return [
        "".join(" ▀▄█"[upper + 2 * lower] for upper, lower in zip(dark[y], dark[y + 1], strict=True))
        for y in range(0, scan.height, 2)
    ]


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
        logits = [model(pixel_values).logits for model in models]
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

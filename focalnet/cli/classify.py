"""``focalnet classify``: prints the most probable labels of images."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .compute import Device, DType, backend_for, device_for, torch_dtype
from .errors import SOME_SKIPPED, UserError
from .images import Skipped, find_images, load_processor
from .inference import Classified, classify_files
from .labels import LabelsFile, use_labels
from .models import UseEma, load_classifier, parse_fields, silence_transformers
from .output import Bar, print_tables, report


def classify(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders (searched recursively) and globs.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A directory, a checkpoint file, a hub id such as microsoft/focalnet-tiny, or digits.",
        ),
    ],
    variant: Annotated[
        str | None, typer.Option(help="The published variant, if a file does not determine it, e.g. large_fl4.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A configuration field that a file does not determine."),
    ] = None,
    use_ema: UseEma = None,
    labels: LabelsFile = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each image.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in one pass.")] = 16,
    backend: Annotated[
        str | None, typer.Option(help="triton, cuda, cpu or reference; chosen automatically by default.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto uses a GPU if there is one.")] = Device.auto,
    dtype: Annotated[DType, typer.Option(help="auto: bfloat16 where the hardware computes in it.")] = DType.float32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Classify images: print a table of the most probable labels for each.

    A file that cannot be read is reported and skipped. Exit code: 0, or 1 if anything was skipped, or 2 if there is no
    image or no model.
    """
    silence_transformers()
    paths, skipped = find_images(images)
    report(skipped)
    if not paths:
        raise UserError(f"no image found in {', '.join(images)}; expected files, folders or globs of images")
    where = device_for(device, backend)
    classifier = load_classifier(model, variant, parse_fields(fields), use_ema)
    use_labels(classifier.config, labels)
    classifier = classifier.to(device=where, dtype=torch_dtype(dtype, where))  # type: ignore[call-arg]  # a wrapped method
    processor = load_processor(model, classifier.config)

    classified = []
    with backend_for(backend), Bar("classifying", len(paths), wanted=not as_json and len(paths) > batch_size) as bar:
        for results in classify_files(classifier, processor, paths, top_k, batch_size):
            good = [result for result in results if isinstance(result, Classified)]
            bad = [result for result in results if isinstance(result, Skipped)]
            skipped += bad
            with bar.aside(len(results)):
                report(bad)
                if as_json:
                    classified += good
                else:
                    print_tables(good)
    if as_json:
        document = {"model": model, "images": list(map(asdict, classified)), "errors": list(map(asdict, skipped))}
        typer.echo(json.dumps(document, indent=2))
    if skipped:
        raise typer.Exit(SOME_SKIPPED)

"""``focalnet classify``: prints the most probable labels of images."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .compute import Backend, Device, DType, InDType, OnDevice, backend_for, device_for, torch_dtype
from .errors import SOME_SKIPPED, UserError
from .images import Images, Skipped, find_images, load_processor
from .inference import Classified, classify_files
from .labels import LabelsFile, use_labels
from .models import Fields, Model, UseEma, Variant, load_classifier, parse_fields, silence_transformers
from .output import Bar, print_tables, report


def classify(
    images: Images,
    model: Model,
    variant: Variant = None,
    fields: Fields = None,
    use_ema: UseEma = None,
    labels: LabelsFile = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels for each image.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in one pass.")] = 16,
    backend: Backend = None,
    device: OnDevice = Device.auto,
    dtype: InDType = DType.float32,
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

"""``focalnet finetune``: trains a classifier on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import training as options
from .compute import Device, OnDevice
from .models import UseEma


def finetune(
    data: options.Data,
    model: options.Model = None,
    output: options.Output = None,
    recipe: options.RecipeName = None,
    resume: options.Resume = False,
    epochs: options.Epochs = None,
    max_minutes: options.MaxMinutes = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    learning_rate: options.LearningRate = None,
    image_size: options.ImageSize = None,
    seed: options.Seed = None,
    workers: options.Workers = None,
    bf16: options.Bf16 = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    option: options.Options = None,
    fields: options.Fields = None,
    use_ema: UseEma = None,
    keep_head: Annotated[
        bool, typer.Option("--keep-head", help="Train the model's own head; it must have all labels of the data.")
    ] = False,
    strict: options.Strict = False,
    check: options.Check = True,
    device: OnDevice = Device.auto,
    dry_run: options.DryRun = False,
    images: options.Images = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a classifier on the images in DATA, from a checkpoint or from scratch.

    If DATA has no validation split, every fifth image of each class is held out. The output folder loads in
    transformers, and in focalnet classify, evaluate and convert. Exit code: 0, or 1 if unreadable images were left
    out, or 2 if nothing was trained.
    """
    options.prepare(data)
    from ..training import Run
    from ..training import finetune as train

    chosen = options.chosen_recipe(recipe, "finetune", "digits" if data == "digits" and model is None else "finetune")
    settings = options.settings_of(
        chosen,
        option,
        epochs=epochs,
        max_minutes=max_minutes,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        image_size=image_size,
        seed=seed,
        workers=workers,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
    )
    run = Run(
        data=data,
        output=output or Path("runs", Path(data).name),
        settings=settings,
        reader=options.reader(),
        start=options.start_of(model, chosen, fields, use_ema),
        recipe=chosen.name,
        device=None if device is Device.auto else device.value,
        resume=resume,
        strict=strict,
        check=check,
        keep_head=keep_head,
    )
    if dry_run:
        return options.show_plan(run, "finetune", images, chosen.source, as_json)
    options.show_run(train, run, as_json)

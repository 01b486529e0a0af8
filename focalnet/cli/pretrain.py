"""``focalnet pretrain``: trains on images without labels, by reconstructing masked parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import training as options
from .compute import Device, OnDevice
from .models import UseEma


def pretrain(
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
    mask_ratio: Annotated[float | None, typer.Option(help="Share of each image that is masked.")] = None,
    seed: options.Seed = None,
    workers: options.Workers = None,
    bf16: options.Bf16 = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    option: options.Options = None,
    fields: options.Fields = None,
    use_ema: UseEma = None,
    strict: options.Strict = False,
    check: options.Check = True,
    device: OnDevice = Device.auto,
    dry_run: options.DryRun = False,
    images: options.Images = None,
    as_json: options.AsJson = False,
) -> None:
    """Train on the images in DATA without labels, as in SimMIM: predict the pixels of masked squares.

    The output folder loads in transformers, and in focalnet finetune --model. Exit codes are those of finetune.
    """
    options.prepare(data)
    from ..training import Run
    from ..training import pretrain as train

    chosen = options.chosen_recipe(recipe, "pretrain", "photographs" if data == "photographs" else "pretrain")
    settings = options.settings_of(
        chosen,
        option,
        epochs=epochs,
        max_minutes=max_minutes,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        image_size=image_size,
        mask_ratio=mask_ratio,
        seed=seed,
        workers=workers,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
    )
    run = Run(
        data=data,
        output=output or Path("runs", f"{Path(data).name}-pretrained"),
        settings=settings,
        reader=options.reader(),
        start=options.start_of(model, chosen, fields, use_ema),
        recipe=chosen.name,
        device=None if device is Device.auto else device.value,
        resume=resume,
        strict=strict,
        check=check,
    )
    if dry_run:
        return options.show_plan(run, "pretrain", images, chosen.source, as_json)
    options.show_run(train, run, as_json)

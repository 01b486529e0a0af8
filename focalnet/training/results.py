"""Summarises a run and writes the files of the trained model."""

from __future__ import annotations

import math
import platform
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import BaseImageProcessor

from .._version import __version__
from .card import write_card
from .checking import Unreadable
from .curves import plot_curves
from .saving import STAGING, move_files, write_json
from .trainer import FocalNetTrainer

if TYPE_CHECKING:
    from .runs import Run


def is_evaluated(trainer: FocalNetTrainer) -> bool:
    """Whether the current weights have been evaluated on the held-out images."""
    last = trainer.state.global_step
    return any("eval_loss" in entry and entry["step"] == last for entry in trainer.state.log_history)


def mean_colour_loss(trainer: FocalNetTrainer) -> float:
    """The loss of predicting the mean colour everywhere, on the held-out images with the masks of the evaluation."""
    accelerator = trainer.accelerator
    sums = torch.zeros(4, device=accelerator.device)  # red, green and blue, and the number of images
    for batch in trainer.get_eval_dataloader():
        sums[:3] += batch["pixel_values"].mean((2, 3)).sum(0)
        sums[3] += len(batch["pixel_values"])
    sums = accelerator.reduce(sums)
    colour = (sums[:3] / sums[3]).view(3, 1, 1)
    model = accelerator.unwrap_model(trainer.model)
    errors = torch.zeros(2, device=accelerator.device)
    for batch in trainer.get_eval_dataloader():
        pixels = batch["pixel_values"]
        side = math.isqrt(batch["bool_masked_pos"].shape[1])
        mask = batch["bool_masked_pos"].view(-1, side, side)
        loss = model._masked_loss(pixels, colour.expand_as(pixels), mask)
        errors += torch.stack([loss * len(pixels), torch.ones_like(loss) * len(pixels)])
    total, images = accelerator.reduce(errors).tolist()
    return total / images


def summarise(
    run: Run,
    task: str,
    trainer: FocalNetTrainer,
    started: dict[str, Any],
    skipped: list[Unreadable],
    seconds: dict[str, float],
    out_of_time: bool,
) -> dict[str, Any]:
    """The content of summary.json: the facts in ``started`` and the results."""
    history = trainer.state.log_history
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = {
        ours: last[theirs]
        for ours, theirs in (("accuracy", "eval_accuracy"), ("top5", "eval_top5"), ("held_out_loss", "eval_loss"))
        if theirs in last
    }
    return {
        "task": task,
        "data": run.data,
        "recipe": run.recipe,
        "model": run.start.model,
        **started,
        **evaluated,
        "loss": losses[-1] if losses else None,
        "epochs_done": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "stopped": "time" if out_of_time else "end",
        **seconds,
        "processes": trainer.args.world_size,
        "seed": run.settings.seed,
        "averaged_weights": run.settings.ema > 0,
        "skipped": [asdict(one) for one in skipped],
        "settings": asdict(run.settings),
        "versions": {
            "focalnet": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def write_results(
    run: Run,
    trainer: FocalNetTrainer,
    processor: BaseImageProcessor,
    summary: dict[str, Any],
) -> None:
    """Write the model, its processor and card, the curves and the summary to the output folder.

    All processes must call it, since each may hold a shard of the weights. The first one writes.
    """
    aside = run.output / STAGING
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    with nullcontext() if trainer.average is None else trainer.average.in_place():
        weights = trainer.whole_weights()
        if trainer.args.should_save:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(aside, state_dict=weights)
    if not trainer.args.should_save:
        return
    processor.save_pretrained(aside)
    write_card(aside / "README.md", summary)
    plot_curves(trainer.state.log_history, aside / "curves.png", f"{summary['task']} on {run.data}")
    write_json(aside / "summary.json", summary)
    move_files(aside, run.output)

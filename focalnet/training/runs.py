"""A run from its data to its files: checks first, then training, then what others load."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from .._version import __version__
from ..models.processing import published_processor
from .averaging import Average
from .batches import ClassificationBatch, MaskedBatch
from .card import write_card
from .checking import Unreadable, without_unreadable
from .curves import plot_curves
from .events import Events, Telling, TimeLimit
from .models import Start, classifier, masked_model
from .saving import STAGING, checkpoints, move_files, why_no_space, write_json
from .settings import Settings
from .sources import ImageReader, Source, load_source
from .trainer import CHECKPOINTS_KEPT, FocalNetTrainer, accuracy, most_probable
from .views import EvaluationViews, TrainingViews

RUN_FILE = "run.json"
# What a resumed run may have otherwise without another result.
_FREE_ON_RESUMING = ("max_minutes", "workers", "save_steps")


@dataclass(frozen=True)
class Run:
    """What to train, on what, where to, and how.

    data: as `load_source` takes it. output: the folder to write to. recipe: its name, for the record. device: "cpu",
    "cuda" or None for a GPU where there is one. check: decode every image first. strict: refuse where one cannot be
    read. keep_head: train the head that is there.
    """

    data: str
    output: Path
    settings: Settings
    reader: ImageReader
    start: Start
    recipe: str | None = None
    device: str | None = None
    resume: bool = False
    strict: bool = False
    check: bool = True
    keep_head: bool = False


def finetune(run: Run, events: Events | None = None) -> dict[str, Any]:
    """Train a classifier of the data's labels. Returns the summary that is written to summary.json.

    Raises:
        ValueError: the data, the model or the settings do not fit, or the output is taken; before training starts.
    """
    events = events or Events()
    source, skipped = _source(run, events, labelled=True)
    set_seed(run.settings.seed)
    model, places, head = classifier(run.start, source.labels, run.settings, run.keep_head)
    batch = ClassificationBatch(run.settings)
    facts = {"classes": len(source.labels), "head": head}
    evaluation = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_probable}
    return _train(run, "finetune", model, source, skipped, batch, events, facts, places, evaluation)


def pretrain(run: Run, events: Events | None = None) -> dict[str, Any]:
    """Train a model to reconstruct masked patches, without labels. Returns and raises as `finetune`.

    The summary has ``mean_colour_loss`` too: the loss of who predicts the mean colour of the held-out images.
    """
    events = events or Events()
    source, skipped = _source(run, events, labelled=False)
    set_seed(run.settings.seed)
    model = masked_model(run.start, run.settings)
    stride = model.focalnet.embeddings.patch_embeddings.projection.stride[0]
    network = stride * 2 ** (len(model.config.depths) - 1)
    if run.settings.image_size % network:
        raise ValueError(
            f"image_size: expected a multiple of the network's stride {network}, got {run.settings.image_size}"
        )
    batch = MaskedBatch(run.settings, stride)
    facts = {"mask_ratio": run.settings.mask_ratio}
    return _train(run, "pretrain", model, source, skipped, batch, events, facts)


def _source(run: Run, events: Events, labelled: bool) -> tuple[Source, list[Unreadable]]:
    _refuse_taken_output(run)
    source = load_source(run.data, run.reader, labelled)
    skipped: list[Unreadable] = []
    if run.check:
        source, skipped = without_unreadable(source, run.reader, run.strict, events.checked)
    for one in skipped:
        events.skipped(one.path, one.error)
    if source.labels is not None and (lost := set(range(len(source.labels))) - set(source.train["label"])):
        names = ", ".join(source.labels[label] for label in sorted(lost)[:5])
        raise ValueError(f"DATA {run.data}: no image to train on of {len(lost)} of its classes: {names}")
    return source, skipped


def _refuse_taken_output(run: Run) -> None:
    if run.resume or not run.output.exists():
        return
    if not run.output.is_dir() or any(run.output.iterdir()):
        raise ValueError(
            f"output {run.output}: there is something already; --resume goes on, else choose another folder"
        )


def _train(
    run: Run,
    task: str,
    model: PreTrainedModel,
    source: Source,
    skipped: list[Unreadable],
    batch: object,
    events: Events,
    facts: dict[str, Any],
    places: list[int] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    settings = run.settings
    processor = published_processor(model.config, settings.crop_fraction, settings.image_mean, settings.image_std)
    arguments = _arguments(run, len(source.train), source.held_out is not None, task)
    _check_batch(run, arguments, len(source.train))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    needed = bytes_on_disk(parameters, settings.ema > 0)
    if reason := why_no_space(run.output, needed):
        raise ValueError(f"output {run.output}: {reason}; free some space, or choose another disk")
    resume_from = _checkpoint_to_resume(run, arguments, task, source, events)

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    average = Average(model, settings.ema) if settings.ema else None
    trainer = FocalNetTrainer(
        model=model,
        args=arguments,
        data_collator=batch,
        train_dataset=TrainingViews(source.train, run.reader, settings, places),
        eval_dataset=_held_out(source, run.reader, processor, places),
        settings=settings,
        average=average,
        **(evaluation or {}),
    )
    if trainer.is_fsdp_enabled:
        raise ValueError("FSDP: not supported here; DistributedDataParallel is (torchrun, or accelerate without FSDP)")
    limit = _set_up_callbacks(trainer, run, events, source.held_out is not None)
    if average is not None and resume_from is not None:
        average.load(resume_from)
    global_batch = settings.batch_size * settings.accumulate * arguments.world_size
    started = {
        **facts,
        "images": len(source.train),
        "held_out": 0 if source.held_out is None else len(source.held_out),
        "parameters": parameters,
        "batch": global_batch,
        "learning_rate": settings.rates(global_batch)[0],
        "epochs": settings.epochs,
        "device": str(arguments.device),
        "output": str(run.output),
        "resumed_from": None if resume_from is None else resume_from.name,
    }
    if arguments.process_index == 0:
        events.started(started)
    wall, cpu = time.perf_counter(), time.process_time()
    _train_within_memory(trainer, resume_from, settings)
    if source.held_out is not None and not _is_evaluated(trainer):
        trainer.evaluate()  # the run was over when it was resumed
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    summary = _summary(run, task, trainer, started, skipped, seconds, bool(limit and limit.struck))
    if task == "pretrain" and source.held_out is not None:
        summary["mean_colour_loss"] = mean_colour_loss(trainer)
    if arguments.process_index == 0:
        _write(run, trainer, processor, average, summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def _arguments(run: Run, images: int, has_held_out: bool, task: str) -> TrainingArguments:
    s = run.settings
    world = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch = s.batch_size * s.accumulate * world
    peak, least, first = s.rates(global_batch)
    each_epoch = max(1, images // (s.batch_size * world) // s.accumulate)
    on_cpu = run.device == "cpu" or not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.output / "checkpoints"),
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.accumulate,
        num_train_epochs=s.epochs,
        learning_rate=peak,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": min(1.0, least / peak), "warmup_lr_rate": min(1.0, first / peak)},
        warmup_steps=round(s.warmup_epochs * each_epoch),
        max_grad_norm=s.clip,
        bf16=s.bf16,
        seed=s.seed,
        data_seed=s.seed,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if on_cpu and world > 1 else None,
        dataloader_num_workers=s.workers,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"] if task == "finetune" else ["bool_masked_pos"],
        prediction_loss_only=task == "pretrain",
        logging_strategy="steps",
        logging_steps=max(1, each_epoch // 10),
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if has_held_out else "no",
        save_strategy="steps" if s.save_steps else "epoch",
        save_steps=s.save_steps or 500,
        report_to="none",
        disable_tqdm=True,
    )


def _check_batch(run: Run, arguments: TrainingArguments, images: int) -> None:
    s = run.settings
    together = s.batch_size * arguments.world_size
    if together > images:
        raise ValueError(
            f"batch_size: expected at most the {images} images to train on, got {s.batch_size} on each of "
            f"{arguments.world_size} process(es); use --batch-size {max(1, images // arguments.world_size)} or less"
        )
    if s.bf16 and arguments.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"bf16: {torch.cuda.get_device_name()} has no bfloat16; leave --bf16 out")


def bytes_on_disk(parameters: int, averaged: bool) -> int:
    """What a run writes at most: float32 weights, two moments of AdamW and the average, kept twice and written once
    more before the oldest goes, and the final weights, written aside first."""
    one = 4 * parameters * (4 if averaged else 3)
    return one * (CHECKPOINTS_KEPT + 1) + 2 * 4 * parameters + 2**20


def _checkpoint_to_resume(
    run: Run, arguments: TrainingArguments, task: str, source: Source, events: Events
) -> Path | None:
    record = {
        "task": task,
        "data": run.data,
        "images": len(source.train),
        "labels": source.labels,
        "model": run.start.model,
        "config": run.start.config or {},
        "processes": arguments.world_size,
        "settings": {k: v for k, v in asdict(run.settings).items() if k not in _FREE_ON_RESUMING},
    }
    record = json.loads(json.dumps(record))
    path = run.output / RUN_FILE
    found = checkpoints(run.output / "checkpoints")
    if run.resume and path.exists():
        _refuse_differences(record, json.loads(path.read_text(encoding="utf-8")), run.output)
    if arguments.process_index == 0:
        write_json(path, record)
        if run.resume and not found:
            events.note(f"nothing to resume in {run.output}: no whole checkpoint there; starting from the beginning")
    return found[-1] if run.resume and found else None


def _refuse_differences(now: dict[str, Any], before: dict[str, Any], output: Path) -> None:
    def flat(record: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in record.items() if k != "settings"}, **record.get("settings", {})}

    now, before = flat(now), flat(before)
    differ = [name for name in now if now[name] != before.get(name)]
    if differ:
        some = "; ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in differ[:4])
        raise ValueError(f"--resume {output}: expected the run that is there, but {some}")


def _held_out(
    source: Source, reader: ImageReader, processor: BaseImageProcessor, places: list[int] | None
) -> EvaluationViews | None:
    return None if source.held_out is None else EvaluationViews(source.held_out, reader, processor, places)


def _set_up_callbacks(trainer: FocalNetTrainer, run: Run, events: Events, has_held_out: bool) -> TimeLimit | None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Telling(events, has_held_out))
    if importlib.util.find_spec("tensorboard") is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(run.output / "tensorboard"))))
    if run.settings.max_minutes is None:
        return None
    limit = TimeLimit(run.settings.max_minutes)
    trainer.add_callback(limit)
    return limit


def _train_within_memory(trainer: FocalNetTrainer, resume_from: Path | None, settings: Settings) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except torch.OutOfMemoryError as error:
        half = max(1, settings.batch_size // 2)
        advice = f"--batch-size {half} --accumulate {2 * settings.accumulate} gives the same steps with half of it"
        if not settings.gradient_checkpointing:
            advice += "; or --gradient-checkpointing keeps only what lies between blocks"
        if not settings.bf16:
            advice += "; or --bf16 halves what is kept"
        raise ValueError(f"CUDA out of memory at batch_size {settings.batch_size}: {advice}") from error


def _is_evaluated(trainer: FocalNetTrainer) -> bool:
    last = trainer.state.global_step
    return any("eval_loss" in entry and entry["step"] == last for entry in trainer.state.log_history)


def mean_colour_loss(trainer: FocalNetTrainer) -> float:
    """The loss on the held-out images, with the masks of the evaluation, of predicting the mean colour everywhere."""
    accelerator = trainer.accelerator
    sums = torch.zeros(4, device=accelerator.device)  # of the three colours, and how many images
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


def _summary(
    run: Run,
    task: str,
    trainer: FocalNetTrainer,
    started: dict[str, Any],
    skipped: list[Unreadable],
    seconds: dict[str, float],
    out_of_time: bool,
) -> dict[str, Any]:
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


def _write(
    run: Run,
    trainer: FocalNetTrainer,
    processor: BaseImageProcessor,
    average: Average | None,
    summary: dict[str, Any],
) -> None:
    """The model, its processor and card, the curves and the summary, into the output folder."""
    aside = run.output / STAGING
    shutil.rmtree(aside, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if average is None:
        model.save_pretrained(aside)
    else:
        with average.in_place():
            model.save_pretrained(aside)
    processor.save_pretrained(aside)
    write_card(aside / "README.md", summary)
    plot_curves(trainer.state.log_history, aside / "curves.png", f"{summary['task']} on {run.data}")
    write_json(aside / "summary.json", summary)
    move_files(aside, run.output)

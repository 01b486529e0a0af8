"""Carries out a run: the checks, training, and the files of the trained model, in this order."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..models.processing import published_processor
from . import processes
from .arguments import trainer_arguments
from .averaging import Average
from .batches import ClassificationBatch, MaskedBatch
from .checking import Unreadable, without_unreadable
from .events import Events, Telling, TimeLimit
from .models import Start, classifier, masked_model, recompute_blocks
from .preconditions import check_batch, check_masks, check_space, checkpoint_to_resume, refuse_taken_output
from .results import is_evaluated, mean_colour_loss, summarise, write_results
from .settings import Settings
from .sources import ImageReader, Source, load_source
from .trainer import FocalNetTrainer, accuracy, most_probable
from .views import EvaluationViews, TrainingViews


@dataclass(frozen=True)
class Run:
    """A training run: its data, model, settings and output.

    Attributes:
        data: a path or name, as in `load_source`.
        output: the folder to write to.
        settings: how to train.
        reader: how image files are read.
        start: the source of the initial weights.
        recipe: the name of the recipe, for the summary.
        device: "cpu", "cuda", or None for a GPU if there is one.
        resume: continue from the last complete checkpoint in ``output``.
        strict: raise an error if an image cannot be read.
        check: decode every image before training.
        keep_head: train the checkpoint's own head.
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


@dataclass(frozen=True)
class _Task:
    """What differs between tasks: the model, its collator, the labels' indices among the outputs, and the metrics."""

    name: str
    model: PreTrainedModel
    batch: ClassificationBatch | MaskedBatch
    facts: dict[str, Any]
    places: list[int] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)


def finetune(run: Run, events: Events | None = None) -> dict[str, Any]:
    """Train a classifier of the data's labels. Returns the summary that is written to summary.json.

    Raises:
        ValueError: the data, the model or the settings do not fit, or the output folder is in use. It is raised before
            training starts.
    """
    events = events or Events()
    source, skipped = _source(run, events, labelled=True)
    set_seed(run.settings.seed)
    model, places, head = classifier(run.start, source.labels, run.settings, run.keep_head)
    batch = ClassificationBatch(run.settings)
    facts = {"classes": len(source.labels), "head": head}
    evaluation = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_probable}
    return _train(run, _Task("finetune", model, batch, facts, places, evaluation), source, skipped, events)


def pretrain(run: Run, events: Events | None = None) -> dict[str, Any]:
    """Train a model to reconstruct masked patches, without labels. Returns and raises as `finetune`.

    The summary also has ``mean_colour_loss``, the loss of a prediction of the mean colour for all held-out images.
    """
    events = events or Events()
    source, skipped = _source(run, events, labelled=False)
    set_seed(run.settings.seed)
    model = masked_model(run.start, run.settings)
    stride = model.focalnet.embeddings.patch_embeddings.projection.stride[0]
    check_masks(run, model.config, stride)
    batch = MaskedBatch(run.settings, stride)
    facts = {"mask_ratio": run.settings.mask_ratio}
    return _train(run, _Task("pretrain", model, batch, facts), source, skipped, events)


def _source(run: Run, events: Events, labelled: bool) -> tuple[Source, list[Unreadable]]:
    processes.meet(on_cpu=run.device == "cpu" or not torch.cuda.is_available())
    refuse_taken_output(run)
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


def _train(run: Run, task: _Task, source: Source, skipped: list[Unreadable], events: Events) -> dict[str, Any]:
    s = run.settings
    arguments = trainer_arguments(run, len(source.train), source.held_out is not None, task.name)
    check_batch(run, arguments, len(source.train))
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    check_space(run, parameters)
    resume_from = checkpoint_to_resume(run, arguments, task.name, source, events)
    processor = published_processor(task.model.config, s.crop_fraction, s.image_mean, s.image_std)
    held_out = None
    if source.held_out is not None:
        held_out = EvaluationViews(source.held_out, run.reader, processor, task.places)
    trainer = _trainer(run, task, arguments, TrainingViews(source.train, run.reader, s, task.places), held_out)
    limit = _set_up_callbacks(trainer, run, events, held_out is not None)
    if trainer.average is not None and resume_from is not None:
        trainer.average.resume(resume_from)
    started = _started(run, task, arguments, source, resume_from) | {"parameters": parameters}
    if arguments.process_index == 0:
        events.started(started)

    wall, cpu = time.perf_counter(), time.process_time()
    _train_within_memory(trainer, resume_from, s)
    if held_out is not None and not is_evaluated(trainer):
        trainer.evaluate()  # the run had already ended when it was resumed
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    summary = summarise(run, task.name, trainer, started, skipped, seconds, bool(limit and limit.struck))
    if task.name == "pretrain" and held_out is not None:
        summary["mean_colour_loss"] = mean_colour_loss(trainer)
    write_results(run, trainer, processor, summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def _trainer(
    run: Run, task: _Task, arguments: TrainingArguments, views: TrainingViews, held_out: EvaluationViews | None
) -> FocalNetTrainer:
    trainer = FocalNetTrainer(
        model=task.model,
        args=arguments,
        data_collator=task.batch,
        train_dataset=views,
        eval_dataset=held_out,
        settings=run.settings,
        average=Average(task.model, run.settings.ema) if run.settings.ema else None,
        **task.evaluation,
    )
    if run.settings.gradient_checkpointing or trainer.recomputes:
        recompute_blocks(task.model)
    return trainer


def _started(
    run: Run, task: _Task, arguments: TrainingArguments, source: Source, resume_from: Path | None
) -> dict[str, Any]:
    global_batch = run.settings.batch_size * run.settings.accumulate * arguments.world_size
    return {
        **task.facts,
        "images": len(source.train),
        "held_out": 0 if source.held_out is None else len(source.held_out),
        "batch": global_batch,
        "learning_rate": run.settings.rates(global_batch)[0],
        "epochs": run.settings.epochs,
        "device": str(arguments.device),
        "output": str(run.output),
        "resumed_from": None if resume_from is None else resume_from.name,
    }


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

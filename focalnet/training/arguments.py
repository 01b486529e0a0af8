"""Converts a run's settings to the Trainer's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments

from . import processes

if TYPE_CHECKING:
    from .runs import Run


def trainer_arguments(run: Run, images: int, has_held_out: bool, task: str) -> TrainingArguments:
    """The Trainer's arguments for ``images`` training images and the processes that torchrun or accelerate started."""
    s = run.settings
    world = processes.count()
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

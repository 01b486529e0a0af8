"""transformers' Trainer with additions for FocalNet.

It adds groups of parameters, mixed labels, averaged weights, and checkpoints that are written atomically.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from . import sharding
from .averaging import Average
from .optimizer import parameter_groups
from .saving import STAGING, keep_latest, publish, why_not_whole
from .settings import Settings
from .views import TrainingViews

CHECKPOINTS_KEPT = 2


class _EpochOfViews(TrainerCallback):
    """Tells the views which epoch begins. accelerate does not if it skips batches or there are several processes."""

    def __init__(self, views: TrainingViews) -> None:
        self.views = views

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.views.epoch = int(state.epoch or 0)


class FocalNetTrainer(Trainer):
    """A Trainer with the run's ``settings``, and the ``average`` of the weights if there is one."""

    def __init__(self, *args: object, settings: Settings, average: Average | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.average = settings, average
        # forward takes **kwargs, so Trainer thinks that the model divides its loss by the number of accumulated items.
        self.model_accepts_loss_kwargs = False
        self._staging: Path | None = None
        self.add_callback(_EpochOfViews(self.train_dataset))
        if average is not None:
            self.add_callback(average)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # The model may have to recompute its blocks, which a configuration of FSDP asks for.
        self.recomputes = sharding.set_up(self.accelerator)
        self.is_fsdp_enabled = sharding.is_wanted()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # accelerate autocasts the forward of other models, but not of sharded ones.
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            s, model = self.settings, self.model if model is None else model
            groups = parameter_groups(
                model, self.model.config.depths, self.args.learning_rate, s.weight_decay, s.layer_decay
            )
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, betas=s.betas, eps=s.eps, fused=True
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        if "other_labels" not in inputs:
            outputs = model(**inputs)
            loss = outputs.loss
        else:
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = mixed_loss(outputs.logits, inputs, self.settings.label_smoothing)
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        # Dropping the last batch is for training, where all steps have the same size. An evaluation uses all images.
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        # An evaluation draws random numbers (its loader's seed). A run that is resumed at the end of an epoch does not
        # repeat the evaluation, yet must continue with the same random numbers.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), nullcontext() if self.average is None else self.average.in_place():
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: object) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's weights by name, gathered on the first process. All processes must call it."""
        model = self.accelerator.unwrap_model(self.model)
        sharding.reshard(model)
        return {name: sharding.whole(tensor) for name, tensor in model.state_dict().items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=self.whole_weights())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The Trainer would save the weights a second time.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        sharding.load_whole(self.model, load_file(Path(resume_from_checkpoint, "model.safetensors")))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        root = Path(self.args.output_dir)
        staged = root / STAGING / f"checkpoint-{self.state.global_step}"
        if why_not_whole(root / staged.name) is None:
            return  # save_steps has just saved this step
        if self.args.should_save:
            shutil.rmtree(root / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = root / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        averages = None if self.average is None else self.average.whole()
        if not self.args.should_save:
            return
        if averages is not None:
            self.average.save(staged, averages)
        publish(staged, root / staged.name)
        staged.parent.rmdir()
        keep_latest(root, CHECKPOINTS_KEPT)


def mixed_loss(logits: Tensor, inputs: dict[str, Tensor], label_smoothing: float) -> Tensor:
    """Cross entropy with both labels of each mixed image, weighted by their shares of the image."""

    def loss(labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    share = inputs["share"]
    if (share == 1).all():
        return loss(inputs["labels"]).mean()
    return (share * loss(inputs["labels"]) + (1 - share) * loss(inputs["other_labels"])).mean()


def most_probable(outputs: object, labels: Tensor) -> Tensor:
    """The indices of the five largest logits, (B, 5) or fewer. Accuracy does not need the rest of up to 21,842."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.topk(min(5, logits.shape[-1])).indices


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy from the result of `most_probable`."""
    hits = prediction.predictions == np.asarray(prediction.label_ids)[:, None]
    return {"accuracy": float(hits[:, 0].mean()), "top5": float(hits.any(-1).mean())}

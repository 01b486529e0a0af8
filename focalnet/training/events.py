"""The events of a run, which the command line displays, and the callback that ends a run at its time limit."""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import processes


@dataclass(frozen=True)
class Epoch:
    """An epoch of a run: progress, mean loss, results on the held-out images, and seconds since the start."""

    epoch: float
    epochs: float
    loss: float | None
    learning_rate: float | None
    held_out_loss: float | None
    accuracy: float | None
    seconds: float


class Events:
    """Receives the events of a run. This class ignores them; the command line's class prints them.

    Only the first process reports the start, steps and epochs.
    """

    def note(self, message: str) -> None:
        """Information for the user."""

    def skipped(self, path: str, reason: str) -> None:
        """An image was left out."""

    def checked(self, done: int, total: int) -> None:
        """``done`` images of ``total`` were decoded."""

    def started(self, facts: dict[str, object]) -> None:
        """Everything is ready, and the first step follows."""

    def step(self, done: int, total: int) -> None:
        """``done`` steps of ``total`` were made."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch ended, and the held-out images were evaluated."""


class Telling(TrainerCallback):
    """Reports steps and epochs to ``events``."""

    def __init__(self, events: Events, has_held_out: bool) -> None:
        self.events, self.has_held_out = events, has_held_out
        self.start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self.events.step(state.global_step, state.max_steps)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self.events.epoch(self._epoch(state))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and not self.has_held_out:
            self.events.epoch(self._epoch(state))

    def _epoch(self, state: TrainerState) -> Epoch:
        recent = [entry for entry in state.log_history if entry["epoch"] > state.epoch - 1 and "loss" in entry]
        evaluated = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
        return Epoch(
            epoch=state.epoch,
            epochs=state.num_train_epochs,
            loss=sum(entry["loss"] for entry in recent) / len(recent) if recent else None,
            learning_rate=recent[-1]["learning_rate"] if recent else None,
            held_out_loss=evaluated.get("eval_loss"),
            accuracy=evaluated.get("eval_accuracy"),
            seconds=time.perf_counter() - self.start,
        )


class TimeLimit(TrainerCallback):
    """Ends training after ``minutes``, with an evaluation and a checkpoint for --resume."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.start = time.monotonic()
        self.struck = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.start = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Clocks differ between processes, and all must stop at the same step.
        is_over = processes.any_of_all(time.monotonic() - self.start > self.seconds)
        if is_over and state.global_step < state.max_steps:
            self.struck = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The Trainer also calls this when an epoch is cut short. Afterwards it evaluates, then saves.
        control.should_save = control.should_save or self.struck

"""The exponential moving average of the weights (EMA), which can replace the model's weights for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sharding import like, part_here, reshard, whole

FILE = "ema.safetensors"
_COUNT = "n_averaged"


class Average(TrainerCallback):
    """An exponential moving average of ``model``'s parameters, taken after each step.

    After n steps the decay is at most (1 + n) / (10 + n), so that the initial weights soon lose their influence. The
    average lies where the parameters lie, in the same shards. torch's AveragedModel is not used, because it copies the
    model before it is moved or sharded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors: dict[str, Tensor] = {}
        self.count = 0
        self._saved: Path | None = None

    def resume(self, folder: Path) -> None:
        """Go on from the average in ``folder`` when training begins. ValueError if the folder has none."""
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder}: no {FILE} in it; the run that wrote it had ema=0")
        self._saved = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._saved is None:
            return
        saved = load_file(self._saved / FILE)
        self.count = int(saved.pop(_COUNT)[0])
        self.tensors = {name: like(saved[name], parameter) for name, parameter in self._parameters().items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        parameters = self._parameters()
        if self.count == 0:
            self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        else:
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            averages = [part_here(tensor) for tensor in self.tensors.values()]
            get_ema_multi_avg_fn(decay)(averages, [part_here(parameter) for parameter in parameters.values()], 0)
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averaged weights. Afterwards it has its own again."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters().items()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(own)

    def whole(self) -> dict[str, Tensor]:
        """What `save` writes. All processes must call it if the model is sharded."""
        tensors = {name: whole(tensor).contiguous() for name, tensor in self.tensors.items()}
        return {**tensors, _COUNT: torch.tensor([self.count])}

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file(dict(tensors), folder / FILE)

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.model)
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters().items():
            parameter.copy_(tensors[name])

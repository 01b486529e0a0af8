"""The exponential moving average of the weights (EMA), which can replace the model's weights for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "ema.safetensors"
_COUNT = "n_averaged"


class Average(TrainerCallback):
    """An exponential moving average of ``model``'s parameters, taken after each step.

    After n steps the decay is at most (1 + n) / (10 + n), so that the initial weights soon lose their influence.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=_growing(decay)).requires_grad_(False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.average.update_parameters(self.model)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averaged weights. Afterwards it has its own again."""
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        _copy(self.average.module.parameters(), self.model)
        try:
            yield
        finally:
            _copy(own, self.model)

    def save(self, folder: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()}
        save_file({**tensors, _COUNT: self.average.n_averaged.view(1)}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Load the average from ``folder``. ValueError if the folder has none."""
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder}: no {FILE} in it; the run that wrote it had ema=0")
        tensors = load_file(folder / FILE)
        self.average.n_averaged.copy_(tensors.pop(_COUNT)[0])
        self.average.module.load_state_dict(tensors)


def _growing(decay: float):  # noqa: ANN202  (torch's own type of these is private)
    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update


@torch.no_grad()
def _copy(tensors: Iterator[Tensor] | list[Tensor], model: nn.Module) -> None:
    for parameter, tensor in zip(model.parameters(), tensors, strict=True):
        parameter.copy_(tensor)

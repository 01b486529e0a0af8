"""Estimates a run before it starts: steps, learning rates, memory and hours, from one measured step."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..variants import VARIANTS
from .models import Start, classifier, masked_model, recompute_blocks
from .preconditions import bytes_on_disk
from .runs import Run
from .settings import Settings
from .sources import load_source

# Pixels in the batch of a measured step on a CPU. The time of larger batches is proportional to their size.
_MEASURED_PIXELS = 2**18
_LEVELS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 60


@dataclass(frozen=True)
class Plan:
    """The estimated size, memory and time of a run.

    Attributes:
        images: number of training images.
        rates: learning rates at `_COLUMNS` steps, evenly spaced over the run.
        memory_of_weights: bytes of weights, gradients, optimizer state and averaged weights.
        memory_for_backward: bytes saved for backward in one pass.
        disk: bytes of all files, at most.
        hours: time of the steps alone.
    """

    images: int
    classes: int | None
    parameters: int
    batch: int
    steps: int
    warmup_steps: int
    learning_rate: float
    rates: list[float]
    memory_of_weights: int
    memory_for_backward: int
    disk: int
    seconds_per_image: float
    hours: float
    device: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        of = "" if self.classes is None else f", {self.classes:,} classes"
        return [
            ("images", f"{self.images:,}{of}"),
            ("model", f"{self.parameters:,} parameters"),
            ("steps", f"{self.steps:,} of {self.batch} images, the first {self.warmup_steps:,} of them warm-up"),
            ("learning rate", f"up to {self.learning_rate:.3g}, then down to {self.rates[-1]:.3g}"),
            (
                "memory",
                f"{_size(self.memory_of_weights)} weights, gradients and optimizer; {_size(self.memory_for_backward)}"
                f" kept for backward in one pass",
            ),
            ("disk", f"{_size(self.disk)} for checkpoints, at most"),
            (
                "time",
                f"{self.hours:.3g} hours on {self.device}: {self.seconds_per_image * 1e3:.3g} ms an image, measured"
                " here; reading images not counted",
            ),
            ("source", self.source),
        ]

    def curve(self) -> str:
        """The learning rate from the first step to the last, as a line of bars."""
        highest = max(self.rates)
        bars = "".join(_LEVELS[round(rate / highest * (len(_LEVELS) - 1))] for rate in self.rates)
        return f"learning rate   {bars}"


def plan(run: Run, task: str, images: int | None, source: str = "") -> Plan:
    """The plan of ``run``. With ``images``, the number of training images, its data need not exist.

    Raises:
        ValueError: the data, the model or the settings do not fit.
    """
    s = run.settings
    labels: list[str] | None = None
    if images is None:
        data = load_source(run.data, run.reader, labelled=task == "finetune")
        images, labels = len(data.train), data.labels
    labels = labels or [f"class {index}" for index in range(1000)]
    start = _within_reach(run.start)
    model = classifier(start, labels, s)[0] if task == "finetune" else masked_model(start, s)
    each_epoch = max(1, images // s.batch_size // s.accumulate)
    steps, warmup = int(each_epoch * s.epochs), round(s.warmup_epochs * each_epoch)
    batch = s.batch_size * s.accumulate
    on_cpu = run.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds, kept = _measure(model.to(device), task, s, device)
    return Plan(
        images=images,
        classes=len(labels) if task == "finetune" else None,
        parameters=parameters,
        batch=batch,
        steps=steps,
        warmup_steps=warmup,
        learning_rate=s.rates(batch)[0],
        rates=[_rate(s, batch, steps, warmup, steps * place // _COLUMNS) for place in range(_COLUMNS)],
        memory_of_weights=4 * parameters * (5 if s.ema else 4),
        memory_for_backward=kept * s.batch_size,
        disk=bytes_on_disk(parameters, s.ema > 0),
        seconds_per_image=seconds,
        hours=seconds * steps * batch / 3600,
        device=_name(device),
        source=source,
    )


def _within_reach(start: Start) -> Start:
    """``start``, or a new model of the same variant if published weights cannot be loaded. It costs as much."""
    try:
        if not start.is_new:
            start.load()
    except OSError:
        variant = next((name for name, one in VARIANTS.items() if one.hub == start.model), None)
        if variant is None:
            raise
        return replace(start, model=variant)
    return start


def _rate(s: Settings, batch: int, steps: int, warmup: int, step: int) -> float:
    """The learning rate at ``step``, from the scheduler that the run will use, with a dummy parameter."""
    from transformers import get_scheduler

    peak, least, first = s.rates(batch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        "cosine_warmup_with_min_lr",
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": min(1.0, least / peak), "warmup_lr_rate": min(1.0, first / peak)},
    )
    return peak * scheduler.lr_lambdas[0](step)


def _measure(model: nn.Module, task: str, s: Settings, device: torch.device) -> tuple[float, int]:
    """Seconds per image of a forward and backward pass, and bytes per image saved between them."""
    most = max(1, _MEASURED_PIXELS // s.image_size**2) if device.type == "cpu" else s.batch_size
    count = min(s.batch_size, most)
    inputs: dict[str, Tensor] = {"pixel_values": torch.randn(count, 3, s.image_size, s.image_size, device=device)}
    if task == "finetune":
        inputs["labels"] = torch.zeros(count, dtype=torch.long, device=device)
    else:
        stride = model.focalnet.embeddings.patch_embeddings.projection.stride[0]
        inputs["bool_masked_pos"] = torch.ones(
            count, (-(-s.image_size // stride)) ** 2, dtype=torch.bool, device=device
        )
    model.train()
    if s.gradient_checkpointing:
        recompute_blocks(model)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autocast(device.type, torch.bfloat16, enabled=s.bf16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**inputs).loss
        loss.backward()
        times = []
        for _ in range(2):
            start = time.perf_counter()
            model(**inputs).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times) / count, sum(kept.values()) // count


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this CPU with {torch.get_num_threads()} thread(s)"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""Trains five small networks of equal cost on scikit-learn's digits, and measures what SimMIM adds with few labels.

    python bench/learning.py                 all labels: FocalNet (ours, transformers'), Swin, ViT, ConvNeXt
    python bench/learning.py --few-labels    10 percent of the labels: from scratch, and after pre-training
    python bench/learning.py --times         the step time of each network; needs a quiet machine for half a minute

The networks are those of small_networks.py. All have the recipe `digits`, tuned for a FocalNet, without stochastic
depth. Every seed draws weights, views, the order of images, and which labels are kept. Pre-training sees the images of
the whole training split, without labels. Each run's accuracy on the held-out fifth, evaluation by evaluation, is a row
of bench/results/<device>/learning.json. Accuracies do not depend on how busy the machine is. Seconds are computed from
--times: epochs x steps x the time of a step, without making views and without evaluations. All runs take about half an
hour on two cores.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer
from learning_curves import ALL, FEW, KIND, PRETRAINED
from rich.console import Console
from small_networks import IMAGE_SIZE, NETWORKS, OURS, size_of
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from focalnet.benchmark import timing
from focalnet.benchmark.environment import facts
from focalnet.benchmark.rows import write
from focalnet.cli.training import reader
from focalnet.models.processing import published_processor
from focalnet.training import Run, Settings, load_recipe
from focalnet.training.arguments import trainer_arguments
from focalnet.training.averaging import Average
from focalnet.training.batches import ClassificationBatch, MaskedBatch
from focalnet.training.models import Start
from focalnet.training.optimizer import parameter_groups
from focalnet.training.sources import Source, load_source
from focalnet.training.trainer import FocalNetTrainer, accuracy, mixed_loss, most_probable
from focalnet.training.views import EvaluationViews, TrainingViews

KEPT = 0.1
SEEDS = (0, 1, 2)
ROUNDS = 30

_DIGITS = load_recipe("digits").settings.but(drop_path=0.0)
_VIEWS = {name: getattr(_DIGITS, name) for name in ("crop_scale", "flip", "rotate", "shift", "zoom", "shear")}
WITH_ALL = _DIGITS.but(epochs=30)
WITH_FEW = _DIGITS.but(epochs=60, warmup_epochs=3, batch_size=16, learning_rate=1e-3)
PRETRAINING = load_recipe("photographs").settings.but(epochs=30, **_VIEWS)
# Epochs between evaluations. With 10 percent of the labels an epoch has nine steps.
EVERY = {ALL: 1, FEW: 5, PRETRAINED: 5}

console = Console()


def main(
    network: Annotated[list[str], typer.Option(help=f"Some of {', '.join(NETWORKS)}.")] = list(NETWORKS),  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Seeds; each is a run.")] = list(SEEDS),  # noqa: B006
    few_labels: Annotated[bool, typer.Option("--few-labels", help="With 10 percent of the labels.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Measure the time of a step; train nothing.")] = False,
) -> None:
    """Train the networks, or time their steps, and write the rows."""
    if unknown := set(network) - set(NETWORKS):
        raise typer.BadParameter(f"--network: expected some of {', '.join(NETWORKS)}, got {', '.join(unknown)}")
    environment = facts()
    if times:
        found = step_times(network)
        write([row | environment for row in found], KIND, environment["device"])
        for row in found:
            console.print(f"{row['runtime']}: {row['median_s'] * 1e3:.1f} ms a step of {row['batch']} images")
        return
    datasets.disable_progress_bars()
    source = load_source("digits", reader(), labelled=True)
    runs = with_few_labels if few_labels else with_all_labels
    for one in seed:
        for name in network:
            for row in runs(name, one, source):
                console.print(f"{name}, {row['series']}, seed {one}: {row['accuracy'][-1]:.2%}")
                write([row | environment], KIND, environment["device"])


def with_all_labels(name: str, seed: int, source: Source) -> list[dict]:
    model = NETWORKS[name].make_classifier(len(source.labels), seed)
    return [_row(name, seed, ALL, WITH_ALL, learned(model, source, source.train, WITH_ALL.but(seed=seed), EVERY[ALL]))]


def with_few_labels(name: str, seed: int, source: Source) -> list[dict]:
    """From scratch and after pre-training; no rows for a network that has no masked model."""
    network = NETWORKS[name]
    if network.masked is None:
        return []
    table = source.train.select(stratified(source.train["label"], KEPT, seed))
    encoder = pretrained(name, seed, source.train)
    rows = []
    for series in (FEW, PRETRAINED):
        model = network.make_classifier(len(source.labels), seed)
        if series == PRETRAINED:
            take_over(model, encoder)
        found = learned(model, source, table, WITH_FEW.but(seed=seed), EVERY[series])
        rows.append(_row(name, seed, series, WITH_FEW, found))
    return rows


def _row(name: str, seed: int, series: str, settings: Settings, found: dict) -> dict:
    case = {"case": "learning", "series": series, "runtime": name, "seed": seed, "batch": settings.batch_size}
    return case | size_of(name) | {"every": EVERY[series]} | found


def stratified(labels: list[int], share: float, seed: int) -> list[int]:
    """The indices of ``share`` of the images of each class, rounded, drawn by ``seed``."""
    rng = random.Random(seed)
    chosen = []
    for label in sorted(set(labels)):
        places = [place for place, one in enumerate(labels) if one == label]
        chosen += rng.sample(places, round(share * len(places)))
    return sorted(chosen)


def learned(
    model: PreTrainedModel, source: Source, table: datasets.Dataset, settings: Settings, every: int
) -> dict[str, object]:
    """Train a classifier on ``table``. Returns its accuracy on the held-out images after each ``every`` epochs."""
    places = list(range(len(source.labels)))
    processor = published_processor(_config(), settings.crop_fraction, settings.image_mean, settings.image_std)
    views = EvaluationViews(source.held_out, reader(), processor, places)
    trainer = _trainer(
        model,
        TrainingViews(table, reader(), settings, places),
        ClassificationBatch(settings),
        settings,
        held_out=[views[index] for index in range(len(views))],  # processed once, not in each evaluation
        every=every,
    )
    trainer.train()
    found = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return {"images": len(table), "held_out": len(views), "accuracy": [round(one, 5) for one in found]}


def pretrained(name: str, seed: int, table: datasets.Dataset) -> PreTrainedModel:
    """A masked model trained on the images of ``table``. Labels are not used."""
    settings = PRETRAINING.but(seed=seed)
    model = NETWORKS[name].make_masked(seed)
    views = TrainingViews(table.remove_columns("label"), reader(), settings)
    _trainer(model, views, MaskedBatch(settings, NETWORKS[name].stride), settings).train()
    return model


def take_over(model: PreTrainedModel, masked: PreTrainedModel) -> None:
    """Copy the encoder's weights. What only classifiers have (a pooled LayerNorm, a head) stays new."""
    own = model.base_model.state_dict()
    tensors = {name: tensor for name, tensor in masked.base_model.state_dict().items() if name in own}
    model.base_model.load_state_dict(own | tensors)


def _config():
    return NETWORKS[OURS].config(labels=10)


def _trainer(
    model: PreTrainedModel,
    views: TrainingViews,
    batch: ClassificationBatch | MaskedBatch,
    settings: Settings,
    held_out: list[dict] | None = None,
    every: int = 1,
) -> FocalNetTrainer:
    run = Run("digits", Path(tempfile.gettempdir()), settings, reader(), Start(), device="cpu")
    task = "pretrain" if held_out is None else "finetune"
    arguments = trainer_arguments(run, len(views), held_out is not None, task)
    arguments.save_strategy = "no"
    if held_out is not None:
        arguments.eval_strategy = "steps"
        arguments.eval_steps = every * (len(views) // settings.batch_size)
    metrics = {} if held_out is None else {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_probable}
    trainer = FocalNetTrainer(
        model=model,
        args=arguments,
        data_collator=batch,
        train_dataset=views,
        eval_dataset=held_out,
        settings=settings,
        average=Average(model, settings.ema) if settings.ema else None,
        **metrics,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_times(names: list[str], rounds: int = ROUNDS) -> list[dict]:
    """The time of a training step of each network: forward, backward, clipping and AdamW, on random images."""
    measured = timing.measure(
        {name: step_of(NETWORKS[name].make_classifier(labels=10, seed=0).train()) for name in names}, rounds=rounds
    )
    case = {"case": "training step", "batch": WITH_ALL.batch_size, "size": IMAGE_SIZE, "dtype": "float32"}
    return [case | {"runtime": name} | size_of(name) | measured[name].row() for name in names]


def step_of(model: PreTrainedModel) -> Callable[[int], object]:
    s = WITH_ALL
    images = torch.randn(s.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = torch.randint(10, (s.batch_size,))
    inputs = {"labels": labels, "other_labels": labels, "share": torch.ones(s.batch_size)}
    groups = parameter_groups(model, model.config.depths, s.learning_rate, s.weight_decay, s.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, eps=s.eps, fused=True)

    def step(number: int) -> None:
        mixed_loss(model(pixel_values=images).logits, inputs, s.label_smoothing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    typer.run(main)

"""What the rows of learning.py say: for each network the accuracy on held-out images, over epochs and over seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from focalnet.benchmark import rows

KIND = "learning"
ALL, FEW, PRETRAINED = "all labels", "10 percent of the labels", "10 percent of the labels, after SimMIM"
NAMES = {
    "focalnet": "FocalNet, focalnet",
    "transformers": "FocalNet, transformers",
    "Swin": "Swin, transformers",
    "ViT": "ViT, transformers",
    "ConvNeXt": "ConvNeXt, transformers",
}


@dataclass(frozen=True)
class Curve:
    """The accuracies of a network in one series, and the time of an epoch's steps where it was measured.

    Attributes:
        network: its name in the rows.
        epochs: when it was evaluated.
        accuracies: for each seed the accuracies, evaluation by evaluation.
        epoch_s: seconds of an epoch, or None.
        row: a row of the series.
    """

    network: str
    epochs: list[int]
    accuracies: dict[int, list[float]]
    epoch_s: float | None
    row: dict

    @property
    def mean(self) -> list[float]:
        return [statistics.fmean(found) for found in zip(*self.accuracies.values(), strict=True)]

    @property
    def lowest(self) -> list[float]:
        return [min(found) for found in zip(*self.accuracies.values(), strict=True)]

    @property
    def highest(self) -> list[float]:
        return [max(found) for found in zip(*self.accuracies.values(), strict=True)]

    @property
    def seeds(self) -> str:
        count = len(self.accuracies)
        return f"{count} seed{'s' if count > 1 else ''}"

    def epochs_to(self, level: float) -> int | None:
        """The epochs after which the mean over seeds first reaches ``level``."""
        return next((epoch for epoch, mean in zip(self.epochs, self.mean, strict=True) if mean >= level), None)


def curves(device: str, series: str) -> list[Curve]:
    """The curves of a series, in the order of `NAMES`."""
    measured = rows.read(KIND, device)
    steps = {row["runtime"]: row["median_s"] for row in measured if row["case"] == "training step"}
    found = []
    for network in NAMES:
        of_network = [row for row in measured if row.get("series") == series and row["runtime"] == network]
        if not of_network:
            continue
        first = of_network[0]
        step_s = steps.get(network)
        found.append(
            Curve(
                network=network,
                epochs=[first["every"] * (place + 1) for place in range(len(first["accuracy"]))],
                accuracies={row["seed"]: row["accuracy"] for row in of_network},
                epoch_s=None if step_s is None else first["images"] // first["batch"] * step_s,
                row=first,
            )
        )
    return found

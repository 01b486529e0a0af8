"""Plots loss, learning rate and accuracy of a run against epochs."""

from __future__ import annotations

from pathlib import Path

from ..pictures import style


def plot_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Write the curves of a Trainer's ``log_history`` to ``path``, a PNG."""
    has_accuracy = any("eval_accuracy" in entry for entry in history)
    with style.styled():
        figure = style.new_figure(12, 4)
        panels = figure.subplots(1, 3 if has_accuracy else 2)
        _lines(panels[0], history, {"loss": "training", "eval_loss": "held out"}, "loss")
        _lines(panels[1], history, {"learning_rate": ""}, "learning rate")
        if has_accuracy:
            _lines(panels[2], history, {"eval_accuracy": "held out"}, "accuracy")
        figure.suptitle(title, x=0.01, ha="left")
        style.save(figure, path)


def _lines(panel: object, history: list[dict[str, float]], names: dict[str, str], what: str) -> None:
    ends = []
    for name, label in names.items():
        points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
        if points:
            colour = style.COLOURS[label == "held out"]
            panel.plot(*zip(*points, strict=True), color=colour, marker="." if len(points) < 40 else None)
            ends.append((label, *points[-1], colour))
    panel.set_xlabel("epoch")
    panel.set_title(what)
    panel.grid(axis="y")
    style.label_ends(panel, ends)

"""Plots loss, learning rate and accuracy of a run against epochs."""

from __future__ import annotations

from pathlib import Path


def plot_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Write the curves of a Trainer's ``log_history`` to ``path``, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would choose a backend for the whole process and keep figures alive.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    has_accuracy = any("eval_accuracy" in entry for entry in history)
    panels = figure.subplots(1, 3 if has_accuracy else 2)
    _lines(panels[0], history, {"loss": "training", "eval_loss": "held out"}, "loss")
    _lines(panels[1], history, {"learning_rate": "learning rate"}, "learning rate")
    if has_accuracy:
        _lines(panels[2], history, {"eval_accuracy": "held out"}, "accuracy")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _lines(panel: object, history: list[dict[str, float]], names: dict[str, str], what: str) -> None:
    for name, label in names.items():
        points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    panel.set_xlabel("epoch")
    panel.set_ylabel(what)
    panel.grid(alpha=0.3)
    if len(names) > 1:
        panel.legend()

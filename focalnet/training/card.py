"""Writes the card of a trained model: its data, settings and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .settings import Settings

_DATA = {
    "digits": (
        "the 1,797 scans of handwritten digits in scikit-learn (UCI, Optical Recognition of Handwritten Digits, "
        "E. Alpaydin and C. Kaynak, CC BY 4.0), 8 x 8 pixels"
    ),
    "photographs": "patches of 64 x 64 pixels of seven colour photographs in scikit-image",
}


def write_card(path: Path, summary: dict[str, Any]) -> None:
    """Write README.md, in Markdown with the hub's header, from a run's summary."""
    path.write_text("\n".join(_lines(summary)) + "\n", encoding="utf-8")


def _lines(s: dict[str, Any]) -> list[str]:
    task = "image-classification" if s["task"] == "finetune" else "masked-image-modeling"
    changed = {
        name: value
        for name, value in s["settings"].items()
        if value != getattr(Settings(), name) and value is not None
    }
    data = _DATA.get(s["data"], s["data"])
    lines = [
        "---",
        "library_name: focalnet",
        f"pipeline_tag: {task}",
        "tags: [focalnet]",
        "---",
        "",
        f"# FocalNet, {s['task']} on {s['data']}",
        "",
        f"- Data: {data}; {s['images']:,} images to train on, {s['held_out']:,} held out"
        + (" (every fifth of each class, in order)." if s["data"] in _DATA else "."),
        f"- Start: {s['model'] or 'from scratch'}; {s['parameters']:,} parameters.",
        f"- Recipe: {s['recipe'] or 'none'}; {s['epochs_done']:g} epochs, {s['steps']:,} steps of {s['batch']} "
        f"images, AdamW, warm-up and cosine; seed {s['seed']}"
        + (", the average of the weights over training." if s["averaged_weights"] else "."),
    ]
    if "accuracy" in s:
        errors = round((1 - s["accuracy"]) * s["held_out"])
        lines.append(f"- Accuracy on the held-out images: {s['accuracy']:.2%} ({errors} errors of {s['held_out']:,}).")
    elif "held_out_loss" in s:
        lines.append(
            f"- Loss on the held-out images: {s['held_out_loss']:.4f}; predicting the mean colour: "
            f"{s['mean_colour_loss']:.4f}."
        )
    lines += [
        f"- Trained in {s['seconds']:.0f} s ({s['cpu_seconds']:.0f} s of CPU time) on {s['device']}, with "
        + ", ".join(f"{name} {version}" for name, version in s["versions"].items())
        + ".",
        "",
        "Settings other than the defaults of `focalnet.training.Settings`:",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in changed.items()),
    ]
    return lines

"""The figure of `focalnet explain`: what a model answers for an image, and where its context comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import style
from .maps import Array, as_array, limits, overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from ..inspection import BlockMaps

WIDTH = 12  # inches: 1,200 pixels
_HEAD = 3.4
_MAX_LABEL = 34


def explanation(image: Array, blocks: Sequence[BlockMaps], answers: Sequence[tuple[str, float]], title: str) -> Figure:
    """A figure 1,200 pixels wide: image, answers and mean gates, then a row of maps for each block.

    Args:
        image: what the model sees, (H, W, 3), 0 to 1.
        blocks: maps of a batch of one image.
        answers: labels and their probabilities, the most probable first.
        title: usually the file's name.
    """
    side = _side(blocks, image)
    with style.styled():
        figure = style.new_figure(WIDTH, _HEAD + len(blocks) * (side * tallness(image) + 0.42))
        figure.suptitle(style.shortened(title, 90), x=0.01, ha="left", weight="bold")
        head, *rows = _parts(figure, len(blocks), side * tallness(image) + 0.42)
        _draw_head(head, image, blocks, answers)
        for row, maps in zip(rows, blocks, strict=True):
            draw_block(row, image, maps, columns=_columns(blocks))
    return figure


def draw_block(row: Figure | SubFigure, image: Array, maps: BlockMaps, columns: int, name: str | None = None) -> None:
    """One row: the gates of every level in one scale, their colour bar, and the norm of the modulator on the image."""
    gates, norm = as_array(maps.gates[0]), as_array(maps.modulator_norm[0])
    row.suptitle(name or f"stage {maps.stage + 1}, block {maps.block + 1}", x=0.01, ha="left", fontsize=10)
    ratios = [*[1] * (columns - 1), 0.08, 1]
    axes = row.subplots(1, columns + 1, gridspec_kw={"width_ratios": ratios, "wspace": 0.04})
    between = limits(gates, signed=True)
    for level, (panel, title) in enumerate(zip(axes, level_names(maps), strict=False)):
        drawn = panel.imshow(
            gates[..., level], cmap=style.SIGNED, vmin=between[0], vmax=between[1], extent=_extent(image)
        )
        panel.set_title(title, fontsize=9)
    for panel in axes[:-2]:
        panel.set_axis_off()
    bar = row.colorbar(drawn, cax=axes[-2], ticks=[between[0], 0, between[1]], format="%.2g")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    axes[-1].imshow(overlay(image, norm), extent=_extent(image), interpolation="bilinear")
    axes[-1].set_title(f"modulator norm, to {norm.max():.2g}", fontsize=9)
    axes[-1].set_axis_off()


def level_names(maps: BlockMaps) -> list[str]:
    """What the gate of each level lets through: "gate 1: 3 x 3", ..., "global gate"."""
    fields = maps.receptive_field[:-1]
    return [*(f"gate {level}: {h} × {w}" for level, (h, w) in enumerate(fields, start=1)), "global gate"]


def _columns(blocks: Sequence[BlockMaps]) -> int:
    return max(maps.gates.shape[-1] for maps in blocks) + 1


def tallness(image: Array) -> float:
    """Height over width of a panel, which a strip does not fill."""
    return min(max(image.shape[0] / image.shape[1], 0.3), 3.0)


def _side(blocks: Sequence[BlockMaps], image: Array) -> float:
    """The width of a panel in inches."""
    return min(2.2, 0.88 * WIDTH / _columns(blocks), 2.6 / tallness(image))


def _extent(image: Array) -> tuple[float, float, float, float]:
    return (0, image.shape[1], image.shape[0], 0)


def _parts(figure: Figure, rows: int, height: float) -> list[Any]:
    parts: Any = figure.subfigures(1 + rows, 1, height_ratios=[_HEAD - 0.4, *[height] * rows])
    return list(parts)


def _draw_head(
    head: SubFigure, image: Array, blocks: Sequence[BlockMaps], answers: Sequence[tuple[str, float]]
) -> None:
    picture, answer, mean = head.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1.2, 1.6]})
    picture.imshow(image, interpolation="nearest" if max(image.shape) < 100 else "antialiased")
    picture.set_title(f"what the model sees, {image.shape[1]} × {image.shape[0]}")
    picture.set_axis_off()
    _draw_answers(answer, answers)
    _draw_means(mean, blocks)


def _draw_answers(panel: Axes, answers: Sequence[tuple[str, float]]) -> None:
    panel.set_title("most probable")
    places = range(len(answers))
    panel.barh(places, [probability for _, probability in answers], height=0.32, color=style.COLOURS[0])
    for place, (label, probability) in zip(places, answers, strict=True):
        panel.text(0, place - 0.24, style.cut(label, _MAX_LABEL), va="bottom")
        panel.text(probability + 0.015, place, f"{probability:.1%}", va="center", fontsize=9, color=style.INK)
    panel.set_xlim(0, 1.15)
    panel.set_ylim(max(5, len(answers)) - 0.5, -0.8)
    panel.set_axis_off()


def _draw_means(panel: Axes, blocks: Sequence[BlockMaps]) -> None:
    """Bars of the mean gate of every level, block by block; the global one is grey."""
    panel.set_title("mean gate of each level (G: global)")
    most = max(maps.gates.shape[-1] for maps in blocks)
    width = 0.8 / most
    means = [as_array(maps.gates[0]).mean((0, 1)) for maps in blocks]
    span = max(float(np.abs(np.concatenate(means)).max()), 1e-6)
    for place, values in enumerate(means):
        for level, value in enumerate(values):
            is_global = level == len(values) - 1
            x = place + (level - (len(values) - 1) / 2) * width
            colour = style.FAINT if is_global else style.COLOURS[level % 6]
            panel.bar(x, value, 0.9 * width, color=colour)
            name = "G" if is_global else str(level + 1)
            panel.text(
                x, value + (0.03 if value >= 0 else -0.03) * span, name, ha="center",
                va="bottom" if value >= 0 else "top", fontsize=8, color=colour,
            )  # fmt: skip
    panel.axhline(0, color=style.FAINT, linewidth=0.8)
    panel.set_xticks(range(len(blocks)), [f"stage {m.stage + 1}\nblock {m.block + 1}" for m in blocks])
    panel.margins(y=0.15)
    panel.tick_params(length=0)
    panel.spines["bottom"].set_visible(False)

"""Figures of measured times: bars with their names and values written on them, lines named at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bar = tuple[str, float, str]
"""Name, length, and the value as it is written."""

Groups = Sequence[tuple[str, Sequence[Bar]]]
"""Titles and bars."""

OURS = ("focalnet", "triton", "cuda", "cpu")
"""Names of bars in colour, of runtimes and of backends; the others are grey."""
OTHERS_COLOUR = "#a6a6a6"
BAR_HEIGHT = 0.24
"""Of one bar, in inches."""


def bars(axes: Axes, groups: Groups, height: float | None = None) -> None:
    """Horizontal bars in groups, each with its name at its left and its value at its right, without an axis.

    ``height`` is that of the axes in inches; by default what the bars need.
    """
    y = 0.0
    for title, of_group in groups:
        if title:
            axes.text(0, y, title, weight="bold", va="center", fontsize=9)
            y += 1
        for name, length, value in of_group:
            axes.barh(y, length, height=0.75, color=style.COLOURS[0] if name in OURS else OTHERS_COLOUR)
            axes.annotate(
                name, (0, y), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize=9
            )
            axes.annotate(value, (length, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
            y += 1
        y += 0.5
    axes.set_ylim((height or height_of(groups)) / BAR_HEIGHT - 0.75, -0.75)
    axes.set_xlim(0, 1.4 * max(length for _, of_group in groups for _, length, _ in of_group))
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])


def height_of(groups: Groups) -> float:
    """Inches that `bars` need."""
    return BAR_HEIGHT * sum(len(of_group) + (1.5 if title else 0.5) for title, of_group in groups)


_MODEL = "model: time, and × focalnet's time"
_OPERATOR = "operator focal_modulation: time"


def bench_figure(
    title: str, device: str, models: Sequence[dict[str, Any]], operators: Sequence[dict[str, Any]]
) -> Figure:
    """What ``focalnet bench`` measured: the time of every runtime, and of the operator by every backend and stage.

    Args:
        title: what was measured.
        device: where.
        models: rows with runtime, median_s and ratio.
        operators: rows with stage, case, backend, median_s and floor_s.
    """
    of_models = [("", [(row["runtime"], row["median_s"], _with_ratio(row)) for row in models])] if models else []
    of_operators = _by_stage(operators)
    panels = [groups for groups in (of_models, of_operators) if groups]
    texts = [text for text, groups in ((_MODEL, of_models), (_OPERATOR, of_operators)) if groups]
    height = max(map(height_of, panels))
    with style.styled():
        figure = style.new_figure(12, 1.3 + height)
        figure.suptitle(f"{title}\n{device}", x=0.01, ha="left")
        (axes,) = figure.subplots(1, len(panels), squeeze=False)
        for panel, text, groups in zip(axes, texts, panels, strict=True):
            panel.set_title(text)
            bars(panel, groups, height)
    return figure


def _by_stage(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[Bar]]]:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        group = groups.setdefault(f"{row['stage'].replace(' x ', ' × ')}, {row['case']}", [])
        group.append((row["backend"], row["median_s"], _milliseconds(row["median_s"])))
    return list(groups.items())


def _with_ratio(row: dict[str, Any]) -> str:
    has_ratio = row.get("ratio_to") == "focalnet" and row["runtime"] != "focalnet"
    return _milliseconds(row["median_s"]) + (f"   × {row['ratio']:.2f}" if has_ratio else "")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

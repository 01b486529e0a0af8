"""The style of every figure: colours, type, lines, labels beside what they name.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which people with any colour vision tell apart.
Signed maps go from purple to orange, amounts from dark violet to yellow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000")
MARKERS = "os^vDPX*"
SIGNED, AMOUNT = "PuOr_r", "viridis"
INK, FAINT = "#222222", "#767676"
DPI = 100
SUFFIXES = (".png", ".svg", ".pdf")
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.titlesize": 12,
    "figure.facecolor": "white",
    "svg.hashsalt": "focalnet",  # the same figure gives the same file
    "image.interpolation": "nearest",
}


@contextmanager
def styled() -> Iterator[None]:
    """A context in which figures are made and saved in the style."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_RC, "axes.prop_cycle": cycler(color=COLOURS)}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches, at `DPI` pixels an inch. It belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would choose a backend for the whole process and keep figures alive.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.06, h_pad=0.06)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write ``figure`` to ``path``; the suffix chooses the format. The same figure gives the same bytes.

    Raises:
        ValueError: the suffix is none of `SUFFIXES`.
    """
    if (reason := why_not_path(path)) is not None:
        raise ValueError(f"path: {reason}")
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}}
    with styled():
        figure.savefig(path, metadata=dates[path.suffix.lower()])
    return path


def why_not_path(path: Path) -> str | None:
    """Why no figure can be written to ``path``, by its suffix, or None."""
    if path.suffix.lower() in SUFFIXES:
        return None
    return f"expected a file ending in {', '.join(SUFFIXES)}, got {path}"


def label_ends(axes: Axes, lines: Sequence[tuple[str, float, float, Any]]) -> None:
    """Write names at the right ends of lines, instead of a legend. A line is (name, x, y, colour) of its end.

    Names that would touch are moved apart.
    """
    figure: Any = axes.get_figure()
    axes.autoscale_view()
    height = 1.25 * 9 / 72 * figure.dpi
    lowest = -float("inf")
    for name, x, y, colour in sorted(lines, key=lambda line: line[2]):
        wanted = axes.transData.transform((x, y))[1]
        placed = max(wanted, lowest + height)
        lowest = placed
        axes.annotate(
            name,
            (x, y),
            xytext=(8, (placed - wanted) * 72 / figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )


def shortened(text: str, length: int) -> str:
    """``text`` of at most ``length`` characters, an ellipsis in place of its middle."""
    if len(text) <= length:
        return text
    kept = length - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def cut(text: str, length: int) -> str:
    """``text`` of at most ``length`` characters, an ellipsis in place of its end."""
    return text if len(text) <= length else f"{text[: length - 1]}…"

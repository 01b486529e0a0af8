"""The animation of `focalnet explain --animate`: one frame for each block, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import style
from .explanation import WIDTH, draw_block, tallness
from .maps import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ..inspection import BlockMaps

SECONDS_A_FRAME = 0.8
_LAST_STAYS = 2.5  # times as long


def animate(image: Array, blocks: Sequence[BlockMaps], title: str, path: Path) -> Path:
    """Write a GIF 1,200 pixels wide with the row of maps of each block (see `explanation`) to ``path``."""
    columns = max(maps.gates.shape[-1] for maps in blocks) + 1
    depths = {maps.stage: maps.block + 1 for maps in blocks}
    first, *others = (
        _rendered(_frame(image, maps, columns, f"{style.shortened(title, 60)}   {_place(maps, depths)}"))
        for maps in blocks
    )
    milliseconds = round(1000 * SECONDS_A_FRAME)
    durations = [*[milliseconds] * len(others), round(_LAST_STAYS * milliseconds)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    return path


def _place(maps: BlockMaps, depths: dict[int, int]) -> str:
    return f"stage {maps.stage + 1} of {len(depths)}, block {maps.block + 1} of {depths[maps.stage]}"


def _frame(image: Array, maps: BlockMaps, columns: int, name: str) -> Figure:
    height = min(0.9 * WIDTH / columns * tallness(image), 6) + 0.8
    with style.styled():
        figure = style.new_figure(WIDTH, height)
        draw_block(figure, image, maps, columns, name)
    return figure


def _rendered(figure: Figure) -> Image.Image:
    from PIL import Image

    with style.styled():
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]  # of Agg's canvas
    frame = Image.fromarray(pixels)
    return frame.quantize(palette=frame.quantize(255), dither=Image.Dither.FLOYDSTEINBERG)

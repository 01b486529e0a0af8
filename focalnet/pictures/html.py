"""What the page of `focalnet app` shows, as HTML: answers as bars, and a map over its image.

The map is a picture of its own over the image, so that the page can change its opacity. The values travel with it, so
that the page can read them where the pointer is.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .explanation import level_names
from .maps import Array, as_array, coloured, enlarged, limits, resized, to_8_bit

if TYPE_CHECKING:
    from ..inspection import BlockMaps

_SIDE = 512  # of the picture, in pixels
NORM = "modulator norm"

STYLE = """
.fn-answers { display: grid; grid-template-columns: minmax(4em, max-content) 1fr; gap: .35em .8em; }
.fn-answers .fn-name { overflow-wrap: anywhere; max-width: 16em; }
.fn-answers .fn-bar { display: flex; align-items: center; gap: .5em; }
.fn-answers .fn-bar i { background: #0072B2; height: .9em; display: block; min-width: 1px; }
.fn-view { margin: 0; }
.fn-stack { position: relative; max-width: 512px; cursor: crosshair; line-height: 0; touch-action: none; }
.fn-stack img { width: 100%; margin: 0; image-rendering: pixelated; }
.fn-stack .fn-below { filter: grayscale(1); }
.fn-stack .fn-map { position: absolute; inset: 0; height: 100%; opacity: var(--fn-opacity, .6); }
.fn-view figcaption { margin: .3em 0; }
.fn-legend { display: flex; align-items: center; gap: .5em; max-width: 512px; font-variant-numeric: tabular-nums; }
.fn-legend img { flex: 1; height: .8em; min-width: 0; margin: 0; }
.fn-read { min-height: 3em; font-variant-numeric: tabular-nums; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.fn-message { color: #a33b00; font-weight: 600; overflow-wrap: anywhere; }
"""

SCRIPT = """
document.addEventListener("pointermove", (event) => {
  const stack = event.target.closest && event.target.closest(".fn-stack");
  if (!stack) return;
  const view = stack.closest(".fn-view");
  const {names, values} = JSON.parse(view.dataset.maps);
  const box = stack.getBoundingClientRect();
  const place = (at, from, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at - from) / size * count)));
  const row = place(event.clientY, box.top, box.height, values.length);
  const column = place(event.clientX, box.left, box.width, values[0].length);
  const read = names.map((name, index) => name + " " + values[row][column][index]).join(",  ");
  view.querySelector(".fn-read").textContent = "row " + (row + 1) + ", column " + (column + 1) + ":  " + read;
});
"""


def answers(found: Sequence[tuple[str, float]]) -> str:
    """Labels and their probabilities as bars."""
    rows = (
        f'<span class="fn-name">{html.escape(label)}</span>'
        f'<span class="fn-bar"><i style="width:{75 * probability:.1f}%"></i>{probability:.1%}</span>'
        for label, probability in found
    )
    return f'<div class="fn-answers">{"".join(rows)}</div>'


def message(text: str) -> str:
    """A text in the place of a picture."""
    return f'<p class="fn-message" role="alert">{html.escape(text)}</p>'


def view(image: Array, maps: BlockMaps, level: int) -> str:
    """The image, (H, W, 3) from 0 to 1, with the map of a level over it.

    ``level`` is the index of a gate, or L + 1 for the norm of the modulator.
    """
    gates, norm = as_array(maps.gates[0]), as_array(maps.modulator_norm[0])
    is_gate = level < gates.shape[-1]
    values = gates[..., level] if is_gate else norm
    between = limits(gates if is_gate else values, signed=is_gate)
    names = [*map_names(gates.shape[-1] - 1), NORM]
    described = [*level_names(maps), NORM][level]
    shown = enlarged(image, _SIDE)
    # Gates of single positions are what the pointer reads; a norm is drawn smoothly.
    drawn = values if is_gate else resized(values, shown.shape[:2])
    return (
        f'<figure class="fn-view" data-maps="{html.escape(_values(names, gates, norm))}">'
        f'<div class="fn-stack"><img class="fn-below" alt="what the model sees" src="{_source(shown)}">'
        f'<img class="fn-map" alt="{html.escape(described)}" src="{_source(coloured(drawn, is_gate, between))}"></div>'
        f"<figcaption>stage {maps.stage + 1}, block {maps.block + 1}, {html.escape(described)}; "
        f"{norm.shape[0]} × {norm.shape[1]} positions</figcaption>"
        f'<div class="fn-legend">{between[0]:.2g}<img alt="" src="{_source(_scale(is_gate))}">{between[1]:.2g}</div>'
        f'<div class="fn-read" aria-live="polite">Point at the picture to read its values.</div></figure>'
    )


def map_names(levels: int) -> list[str]:
    """Names of the gates of a block with this many levels."""
    return [*(f"gate {level + 1}" for level in range(levels)), "global gate"]


def _scale(signed: bool) -> Array:
    return coloured(np.linspace(-1 if signed else 0, 1, 128)[None], signed)


def _values(names: list[str], gates: Array, norm: Array) -> str:
    both = np.concatenate([gates, norm[..., None]], -1)
    rounded = [[[float(f"{value:.3g}") for value in column] for column in row] for row in np.nan_to_num(both).tolist()]
    return json.dumps({"names": names, "values": rounded}, separators=(",", ":"))


def _source(image: Array) -> str:
    from PIL import Image

    file = io.BytesIO()
    picture: Any = Image.fromarray(to_8_bit(image))
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

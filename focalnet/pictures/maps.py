"""Colours for maps of a block, and maps laid over the image that they belong to.

An image is an array (H, W, 3) of floats from 0 to 1; a map is an array (h, w).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import style

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
# A map that differs by less than this share of its largest value is drawn in one colour: what differs is rounding.
_LEAST_SPAN = 0.01


def as_array(map_: Tensor) -> Array:
    """The values of a tensor of any dtype and device, as float32."""
    return np.asarray(map_.detach().float().cpu())


def seen_image(pixel_values: Tensor, processor: object) -> Array:
    """What the model sees, as an image (H, W, 3): ``pixel_values`` (3, H, W) without the processor's normalisation."""
    image = as_array(pixel_values).transpose(1, 2, 0)
    if getattr(processor, "do_normalize", True):
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        image = image * np.asarray(1 if std is None else std) + np.asarray(0 if mean is None else mean)
    return np.clip(np.nan_to_num(image), 0, 1)


def limits(values: Array, signed: bool) -> tuple[float, float]:
    """The values that get the first and the last colour. Zero is the middle of signed limits."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    if signed:
        largest = float(np.abs(finite).max()) or 1.0
        return -largest, largest
    low, high = float(finite.min()), float(finite.max())
    return low, max(high, low + _LEAST_SPAN * max(abs(low), abs(high)), low + 1e-12)


def coloured(values: Array, signed: bool, between: tuple[float, float] | None = None) -> Array:
    """(h, w) -> (h, w, 3) from 0 to 1. ``between`` are the limits; by default those of the map."""
    import matplotlib

    low, high = between or limits(values, signed)
    share = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1)
    return matplotlib.colormaps[style.SIGNED if signed else style.AMOUNT](share)[..., :3]


def overlay(
    image: Array,
    values: Array,
    opacity: float = 0.6,
    *,
    signed: bool = False,
    between: tuple[float, float] | None = None,
) -> Array:
    """``image`` in grey with the map in colours over it, (H, W, 3) from 0 to 1.

    Args:
        opacity: of the map; 0 shows the image in its own colours.
        signed: whether the map's colours tell its sign.
        between: values of the first and the last colour; by default those of the map.
    """
    grey = image @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat(grey[..., None], 3, axis=-1)
    between = between or limits(values, signed)
    colours = coloured(resized(values, grey.shape[:2]), signed, between)
    # The image turns grey soon, so that colours are those of the map alone.
    greyness = min(1.0, 3 * opacity)
    below = (1 - greyness) * image + greyness * grey
    return np.clip((1 - opacity) * below + opacity * colours, 0, 1)


def resized(values: Array, size: tuple[int, ...]) -> Array:
    """The map at the size of the image, bilinear between the centres of positions."""
    from PIL import Image

    height, width = size
    map_ = Image.fromarray(np.nan_to_num(values).astype(np.float32))
    return np.asarray(map_.resize((width, height), Image.Resampling.BILINEAR))


def to_8_bit(image: Array) -> Array:
    """From floats in 0 to 1 to bytes."""
    return (image * 255).round().astype(np.uint8)


def enlarged(image: Array, side: int) -> Array:
    """A small image as one whose longer side is about ``side`` pixels; every pixel becomes a square."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)

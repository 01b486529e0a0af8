"""Converts images with more than 8 bits per value to 8 bits.

A file records how many bits its values occupy, but rarely which value is white. Pillow would clip values at 255: most
images would become white, and floating point in 0..1 black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import complain

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Bit depths of cameras, scanners and instruments.
BITS = (8, 10, 12, 14, 16, 24, 32)
# The tags of TIFF: BitsPerSample and MaxSampleValue.
_BITS_TAG, _WHITE_TAG = 258, 281
# Formats whose integers Pillow always scales to 16 bits, whatever the depth of the file.
_SCALED_BY_PILLOW = ("PPM", "JPEG2000")


def to_8_bit(image: Image.Image, opened: Image.Image, name: str) -> Image.Image:
    """``image`` scaled to 8 bits if it is grey with 12 to 32 bits or in floating point, else unchanged.

    White is the value recorded in the file ``opened``. Without a record, white is the maximum of the smallest of
    `BITS` that holds the brightest value, or 1 for floating point up to 1. An image with negative values is scaled by
    its own range. Values that are not finite become black. Guesses are noted on stderr, once for each kind of image.
    ``name`` is the image's name in these notes.

    Raises:
        ValueError: no value is finite.
    """
    import numpy as np
    from PIL import Image

    if not (image.mode.startswith("I;16") or image.mode in ("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no value in it is finite")
    black, white = _range(values[finite], image.mode, opened, name)
    above = np.where(finite, values - black, 0)
    if image.mode == "F":
        scaled = (above * (255 / ((white - black) or 1))).round()
    else:
        scaled = above * 256 // (white - black + 1)
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def _range(values: np.ndarray, mode: str, opened: Image.Image, name: str) -> tuple[float, float]:
    least, greatest = values.min(), values.max()
    if least < 0:
        _note(name, "has negative values", "scaled by its own range, from the least value to the greatest")
        return least, greatest
    if mode == "F" and greatest <= 1:
        return 0, 1
    stated = _stated_white(opened)
    if stated is not None and greatest <= stated:
        return 0, stated
    bits = next((bits for bits in BITS if greatest < 2**bits), None)
    if bits is None:
        _note(name, "has values beyond 32 bits", "scaled by its greatest value")
        return 0, greatest
    if not (mode.startswith("I;16") and bits == 16):
        kind = "floating point beyond 1" if mode == "F" else f"{16 if mode.startswith('I;16') else 32}-bit grey"
        _note(name, f"is {kind} with values up to {greatest:g}", f"taken for {bits} bits: white is {2**bits - 1}")
    return 0, 2**bits - 1


def _stated_white(opened: Image.Image) -> int | None:
    if opened.format in _SCALED_BY_PILLOW:
        return 2**16 - 1
    tags = getattr(opened, "tag_v2", {})
    if _WHITE_TAG in tags:
        return max(_numbers(tags[_WHITE_TAG]))
    bits = max(_numbers(tags.get(_BITS_TAG, 16)))
    # 16 and 32 are only the width of storage. Any smaller number is the true depth.
    return 2**bits - 1 if bits < 16 else None


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def note_if_cut(image: Image.Image, stored: str, name: str) -> None:
    """Note on stderr if a colour image with 16 bits per value does not use all of them.

    Pillow keeps the upper 8 of 16 bits of colour. If these are nearly empty, the image has fewer than 16 bits and is
    nearly black. ``stored`` is Pillow's name for the way values are stored in the file.
    """
    if ";16" not in stored or image.mode not in ("RGB", "RGBA", "LA"):
        return
    colours: Any = image.getextrema()[: len(image.mode) - image.mode.endswith("A")]
    brightest = max(greatest for _, greatest in colours)
    if brightest < 2**6:
        _note(
            name,
            f"has 16 bits a colour, but uses at most {8 + brightest.bit_length()}",
            "it is nearly black to the model; scale its values to all 16 bits, or to 8",
        )


def _note(name: str, what: str, then: str) -> None:
    kind = (what.partition(" up to ")[0], then)
    if kind not in _noted:
        _noted.add(kind)
        complain("note", f"{name} {what}; {then}. Said once for images of this kind.")


_noted: set[tuple[str, str]] = set()

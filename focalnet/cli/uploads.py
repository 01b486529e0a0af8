"""Reads image files that anybody may have sent to the page: small enough, of a known format, no decompression bomb."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .images import read_image, why_unreadable

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
# Without formats that Pillow hands to other programs (EPS) or that are no pictures of one size (icons, PSD, PDF).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def read_upload(path: Path) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        UserError: the file is too large, has too many pixels, or is no image of `FORMATS`; the message says which.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"this file has {size / 2**20:.0f} MB; expected at most {MAX_BYTES // 2**20} MB")
    try:
        # Pillow warns about sizes that are refused here, and about metadata.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_pixels(path)
            return read_image(path, formats=FORMATS)
    except UserError:
        raise
    # Decoders raise many kinds of exceptions on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = why_unreadable(error)
        if type(error).__name__ == "UnidentifiedImageError":
            reason = f"not an image; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"this file is {reason}" if reason.startswith("not") else f"this file {reason}") from None


def _check_pixels(path: Path) -> None:
    """Raise UserError by what the header says, before anything is decompressed."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise UserError(f"this image is too large; expected at most {MAX_PIXELS // 10**6} megapixels") from None
    if width * height > MAX_PIXELS:
        raise UserError(f"this image has {width} x {height} pixels; expected at most {MAX_PIXELS // 10**6} megapixels")

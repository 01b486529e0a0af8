"""Finds image files, reads them, and converts them to a model's input."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from ..models.processing import published_processor
from ..pretrained import shipped
from .depth import note_if_cut, to_8_bit

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import BaseImageProcessor

    from ..configuration import FocalNetConfig

EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Files, folders (searched recursively) and globs.")
]
# Resizing the shortest edge of a strip that is one pixel wide and thousands long would need gigabytes.
_MAX_ELONGATION = 200


@dataclass(frozen=True)
class Skipped:
    """A path without a result, and the reason."""

    path: str
    error: str


def find_images(arguments: Iterable[str]) -> tuple[list[Path], list[Skipped]]:
    """The image files in files, folders (searched recursively) and globs, without duplicates.

    Returns:
        The files, and the arguments without any file.
    """
    found: dict[Path, None] = {}
    skipped = []
    for argument in arguments:
        paths = _expand(argument)
        if isinstance(paths, Skipped):
            skipped.append(paths)
        else:
            found.update(dict.fromkeys(paths))
    return list(found), skipped


def _expand(argument: str) -> list[Path] | Skipped:
    path = Path(argument).expanduser()
    if path.is_dir():
        in_folder = _images_in(path)
        return in_folder or Skipped(argument, f"no image in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
    # An existing file takes precedence over a glob, because its name may contain brackets.
    if path.exists():
        return [path]
    if not any(character in argument for character in "*?["):
        return Skipped(argument, "no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for match in matches for file in (_images_in(match) if match.is_dir() else [match])]
    return files or Skipped(argument, "no file matches this pattern")


def _images_in(folder: Path) -> list[Path]:
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


def read_image(
    source: Path | IO[bytes], name: str | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """The image in RGB and upright by its EXIF tag, as transformers' pipelines read it, scaled to 8 bits if deeper.

    ``name`` is the image's name in notes; by default the file name. ``formats`` are Pillow's names of the formats to
    try; by default all.

    Raises:
        ValueError: the image is extremely long and thin, or has no finite value.
        Exception: the exception of Pillow for a file that it cannot read.
    """
    from PIL import Image, ImageOps

    name = name or Path(str(source)).name
    with Image.open(source, formats=formats) as opened:
        stored = str(opened.tile[0].args) if opened.tile else ""
        image = ImageOps.exif_transpose(opened)
        width, height = image.size
        if max(width, height) > _MAX_ELONGATION * min(width, height):
            raise ValueError(f"{width} x {height} pixels: more than {_MAX_ELONGATION} times longer than wide")
        note_if_cut(image, stored, name)
        return to_8_bit(image, opened, name).convert("RGB")


def why_unreadable(error: Exception) -> str:
    """The reason to report for an exception from `read_image`."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow can read"
    return f"cannot be read: {error or type(error).__name__}"


def load_processor(model: str, config: FocalNetConfig) -> BaseImageProcessor:
    """The image processor saved with the model, else the preprocessing used to evaluate the published models.

    It is always the one built on Pillow, so that results do not depend on whether torchvision is installed.
    """
    from transformers import AutoImageProcessor

    path = Path(model).expanduser()
    path = path if path.exists() else shipped(model) or path
    if path.is_dir() and (path / "preprocessor_config.json").exists():
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    if not path.exists():
        try:
            return AutoImageProcessor.from_pretrained(model, backend="pil")
        except OSError:
            pass  # The model on the hub has none.
    return published_processor(config)


def load_pixels(path: Path, processor: BaseImageProcessor) -> Tensor | Skipped:
    """``pixel_values`` (3, H, W) of one file, or the reason why it was skipped."""
    try:
        image = read_image(path)
    # Decoders raise many kinds of exceptions on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        return Skipped(str(path), why_unreadable(error))
    return processor(images=image, return_tensors="pt")["pixel_values"][0]

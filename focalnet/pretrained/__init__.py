"""Small trained models that come with the package, each a folder as save_pretrained writes it, with its card."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path | None:
    """The folder of the model of that name, such as "digits", or None."""
    folder = Path(__file__).parent / name
    return folder if name.isidentifier() and (folder / "config.json").is_file() else None

"""How far apart the rows of a model's projection begin. Models pad without Triton too: this file imports nothing."""

from __future__ import annotations

ROW_ELEMENTS = 16


def padded_row(features: int) -> int:
    """Elements of a row of so many features: the next multiple of `ROW_ELEMENTS`."""
    return -(-features // ROW_ELEMENTS) * ROW_ELEMENTS

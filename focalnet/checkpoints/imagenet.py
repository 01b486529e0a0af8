"""The classes of ImageNet-1K and of the ImageNet-22K that the authors trained on, by index.

ImageNet-22K has 21,842 outputs in the authors' order: ImageNet-1K's thousand classes in theirs, then the others by
WordNet id (labelmap_22k_reorder.txt of microsoft/FocalNet, which leaves out index 850, a class that 22K lacks and no
image was trained on). So the first thousand outputs are ImageNet-1K's, and one file tells both.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

SIZES = (1000, 21842)
"""How many classes ImageNet-1K and the authors' ImageNet-22K have."""


def class_names(count: int | None) -> list[str] | None:
    """What the classes of the ImageNet of ``count`` classes are called, such as "tench, Tinca tinca", or None."""
    return [name for _, name in _classes()[:count]] if count in SIZES else None


def class_ids(count: int | None) -> list[str] | None:
    """The WordNet ids of these classes, such as "n01440764", which ImageNet's folders are named by, or None."""
    return [wordnet_id for wordnet_id, _ in _classes()[:count]] if count in SIZES else None


@cache
def _classes() -> list[tuple[str, str]]:
    text = (files(__package__) / "imagenet_classes.tsv").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return [(wordnet_id, name) for wordnet_id, _, name in (line.partition("\t") for line in lines)]

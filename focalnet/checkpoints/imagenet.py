"""The classes of ImageNet-1K and of the authors' ImageNet-22K, by index.

The authors' ImageNet-22K has 21,842 outputs: first the thousand classes of ImageNet-1K in their own order, then the
others by WordNet id. The order is that of labelmap_22k_reorder.txt in microsoft/FocalNet. That file omits index 850, a
class that 22K lacks and that had no training images. The first thousand outputs are those of ImageNet-1K, so one file
lists both.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

SIZES = (1000, 21842)
"""Numbers of classes of ImageNet-1K and of the authors' ImageNet-22K."""


def class_names(count: int | None) -> list[str] | None:
    """Names of the ``count`` classes of ImageNet-1K or 22K, such as "tench, Tinca tinca"; None for other counts."""
    return [name for _, name in _classes()[:count]] if count in SIZES else None


def class_ids(count: int | None) -> list[str] | None:
    """WordNet ids of these classes, such as "n01440764", the names of ImageNet's folders; None for other counts."""
    return [wordnet_id for wordnet_id, _ in _classes()[:count]] if count in SIZES else None


@cache
def _classes() -> list[tuple[str, str]]:
    text = (files(__package__) / "imagenet_classes.tsv").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return [(wordnet_id, name) for wordnet_id, _, name in (line.partition("\t") for line in lines)]

"""Checkpoints that are no FocalNet, or one that differs from the published network: said by name, with what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import read_json

# What tells a network whose modules have the authors' names, but that computes something else: (whose it is, why not).
_RELATIVES = (
    (
        re.compile(r"layers\.\d+\.blocks\.\d+\.dw[12]\."),
        "X-Decoder's or SEEM's FocalNet",
        "its blocks have depthwise convolutions (dw1, dw2) of their own and other sums",
    ),
    (
        re.compile(r"layers\.\d+\.blocks\.\d+\.attn\."),
        "a Swin or Focal Transformer",
        "its blocks have attention where FocalNet's have focal modulation",
    ),
)


def refuse_by_name(names: Iterable[str], source: str) -> None:
    """ValueError if the tensors are those of a relative that this package's models cannot compute."""
    names = list(names)
    has_modulation = any(".modulation." in name for name in names)
    for pattern, whose, why in _RELATIVES:
        if any(pattern.match(name) for name in names) and (not has_modulation or "FocalNet" in whose):
            advice = "build it with its own code"
            if has_modulation:
                advice += ", then focalnet.patch(model) makes its modulations fast"
            raise ValueError(f"{source}: this is {whose}, which cannot be read: {why}; {advice}")


def configuration_in(folder: Path) -> dict[str, Any]:
    """A folder's config.json; nothing where there is none, or one that its reader will complain of."""
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}


def check_architecture(folder: str | Path, config: Mapping[str, Any]) -> None:
    """ValueError if a folder's config.json is that of a model without a FocalNet; timm's are of another kind."""
    kind = config.get("model_type")
    if kind is None:
        kind = config.get("architecture")
        if not isinstance(kind, str) or "focalnet" in kind.lower():
            return
        advice = f"timm.create_model({kind!r}, ...) builds it"
    elif "focalnet" in json.dumps(config).lower():  # itself, or the backbone of a larger model
        return
    else:
        advice = "transformers' Auto classes (AutoModel, ...) build it"
    classes = config.get("architectures") or []
    named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
    raise ValueError(f"{folder}: holds a model of type {kind!r}{named}, expected 'focalnet'; {advice}")


def is_foreign(path: Path, config_elsewhere: object = None) -> bool:
    """Whether from_pretrained of transformers cannot read ``path`` by itself: a file, or a directory of timm.

    Args:
        config_elsewhere: where a caller says that the configuration is; the directory's is not looked at then.

    Raises:
        ValueError: it is a directory with a model of another architecture.
    """
    if config_elsewhere or not path.is_dir():
        return path.is_file()
    told = configuration_in(path)
    check_architecture(path, told)
    return "model_type" not in told and "architecture" in told

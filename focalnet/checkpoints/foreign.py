"""Recognises checkpoints of other architectures and of modified FocalNets. The errors name them and say what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import read_json

# Networks whose modules have the authors' names but compute something else: (pattern of names, network, reason).
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
    """Raise ValueError if the tensors belong to a related network that this package's models cannot compute."""
    names = list(names)
    has_modulation = any(".modulation." in name for name in names)
    for pattern, whose, why in _RELATIVES:
        if any(pattern.match(name) for name in names) and (not has_modulation or "FocalNet" in whose):
            advice = "build it with its own code"
            if has_modulation:
                advice += ", then focalnet.patch(model) makes its modulations fast"
            raise ValueError(f"{source}: this is {whose}, which cannot be read: {why}; {advice}")


def configuration_in(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; {} if it is missing or invalid, which its reader reports."""
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}


def check_architecture(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if ``config``, a folder's config.json, describes a model without a FocalNet.

    transformers' files are recognised by "model_type", timm's by "architecture".
    """
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
    """Whether transformers' from_pretrained cannot read ``path`` on its own: a file, or a directory of timm.

    Args:
        path: a file or a directory.
        config_elsewhere: another place of the configuration, given by the caller; the directory's is then ignored.

    Raises:
        ValueError: ``path`` is a directory with a model of another architecture.
    """
    if config_elsewhere or not path.is_dir():
        return path.is_file()
    told = configuration_in(path)
    check_architecture(path, told)
    return "model_type" not in told and "architecture" in told

"""The names of a FocalNet's tensors in each published naming: one table for all directions of conversion.

There are three namings: "transformers", "authors" (microsoft/FocalNet, classification and detection) and "timm".
transformers' names are listed without the "focalnet." prefix that models with a head add to the names of the body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import starmap

from torch import Tensor

from ..fusion.part_names import BLOCK, MODULATION

NAMINGS = ("transformers", "authors", "timm")


@dataclass(frozen=True)
class Row:
    """The name of one module or parameter in each naming; None if a naming has no such tensor.

    ``{stage}``, ``{layer}`` and ``{level}`` stand for indices from 0, ``{stage+1}`` for an index from 1. ``{post}`` is
    "_post" if LayerNorm comes after a branch, else empty. ``pointwise`` marks layers that are linear in transformers
    and the authors' code, and 1x1 convolutions in timm.
    """

    transformers: str
    authors: str | None
    timm: str | None
    pointwise: bool = False


def _in_block(transformers: str, authors: str, timm: str, pointwise: bool = False) -> Row:
    block = "layers.{stage}.blocks.{layer}."
    return Row("encoder.stages.{stage}.layers.{layer}." + transformers, block + authors, block + timm, pointwise)


def _in_modulation(part: str, pointwise: bool = False) -> Row:
    transformers, authors, timm = (f"modulation.{getattr(MODULATION[naming], part)}" for naming in NAMINGS)
    return _in_block(transformers, authors, timm, pointwise)


def _layer_scales() -> tuple[Row, ...]:
    return tuple(starmap(_in_block, zip(*(BLOCK[naming].scale_parameters for naming in NAMINGS), strict=True)))


TABLE = (
    Row("embeddings.patch_embeddings.projection", "patch_embed.proj", "stem.proj"),
    Row("embeddings.norm", "patch_embed.norm", "stem.norm"),
    Row("embeddings.mask_token", None, None),
    _in_block("norm1", "norm1", "norm1{post}"),
    _in_block("norm2", "norm2", "norm2{post}"),
    _in_modulation("projection_in", pointwise=True),
    _in_block(
        "modulation.focal_layers.{level}.0", "modulation.focal_layers.{level}.0", "modulation.focal_layers.{level}.0"
    ),
    _in_modulation("projection_context"),
    _in_modulation("layernorm"),
    _in_modulation("projection_out", pointwise=True),
    _in_block("mlp.fc1", "mlp.fc1", "mlp.fc1", pointwise=True),
    _in_block("mlp.fc2", "mlp.fc2", "mlp.fc2", pointwise=True),
    *_layer_scales(),
    # In timm a downsampling belongs to the stage after it.
    Row(
        "encoder.stages.{stage}.downsample.projection",
        "layers.{stage}.downsample.proj",
        "layers.{stage+1}.downsample.proj",
    ),
    Row(
        "encoder.stages.{stage}.downsample.norm", "layers.{stage}.downsample.norm", "layers.{stage+1}.downsample.norm"
    ),
    Row("layernorm", "norm", "norm"),
    Row("classifier", "head", "head.fc"),
    Row("decoder.0", None, None),
    Row("hidden_states_norms.stage{stage+1}", "norm{stage}", None),
    Row("hidden_states_norms.stem", None, None),
)

_NUMBER, _FROM_ONE = r"(?:0|[1-9]\d*)", r"[1-9]\d*"
_PLACES = {
    "{stage}": f"(?P<stage>{_NUMBER})",
    "{stage+1}": f"(?P<next_stage>{_FROM_ONE})",
    "{layer}": f"(?P<layer>{_NUMBER})",
    "{level}": f"(?P<level>{_NUMBER})",
    "{post}": "(?P<post>_post)?",
}


@cache
def _patterns(naming: str) -> tuple[tuple[Row, re.Pattern[str]], ...]:
    """The rows that exist in ``naming``, each with the pattern that matches its names."""
    patterns = []
    for row in TABLE:
        if (template := getattr(row, naming)) is not None:
            pieces = re.split(r"(\{[^}]*\})", template)
            body = "".join(_PLACES.get(piece, re.escape(piece)) for piece in pieces)
            patterns.append((row, re.compile(body + r"(?P<suffix>(?:\.weight|\.bias)?)")))
    return tuple(patterns)


@dataclass(frozen=True)
class Key:
    """A parsed name: its row of the table and the values of the row's placeholders."""

    row: Row
    suffix: str
    stage: int = 0
    layer: int = 0
    level: int = 0
    is_post_norm: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether this is the weight of a linear layer that is a 1x1 convolution in timm."""
        return self.row.pointwise and self.suffix == ".weight"

    def named(self, naming: str, post_norm: bool = False) -> str | None:
        """The name in ``naming``, or None if that naming has no such tensor."""
        name = getattr(self.row, naming)
        if name is None:
            return None
        places = {
            "{stage}": str(self.stage),
            "{stage+1}": str(self.stage + 1),
            "{layer}": str(self.layer),
            "{level}": str(self.level),
            "{post}": "_post" if post_norm else "",
        }
        for place, value in places.items():
            name = name.replace(place, value)
        return name + self.suffix


def parse(name: str, naming: str) -> Key | None:
    """Parse a ``name`` of ``naming``; None if it is not in the table."""
    for row, pattern in _patterns(naming):
        if (match := pattern.fullmatch(name)) is not None:
            found = {place: value for place, value in match.groupdict().items() if value is not None}
            suffix, is_post_norm = found.pop("suffix"), found.pop("post", None) is not None
            numbers = {place: int(value) for place, value in found.items()}
            if "next_stage" in numbers:
                numbers["stage"] = numbers.pop("next_stage") - 1
            return Key(row, suffix, is_post_norm=is_post_norm, **numbers)
    return None


def rename(
    tensors: Mapping[str, Tensor], source: str, target: str, post_norm: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename tensors from naming ``source`` to naming ``target``, and reshape linear layers as ``target`` needs.

    ``post_norm`` means that LayerNorm comes after the branches, which shows in timm's names. No value changes, and
    renaming back gives the same names and tensors.

    Returns:
        The renamed tensors, and the tensors that are unknown in ``source`` or have no name in ``target``.
    """
    renamed: dict[str, Tensor] = {}
    unknown: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = parse(name, source)
        new_name = None if key is None else key.named(target, post_norm)
        misplaced = source == "timm" and key is not None and key.named(source, post_norm) != name
        if key is None or new_name is None or new_name in renamed or misplaced:
            unknown[name] = tensor
            continue
        renamed[new_name] = _reshaped(tensor, target) if key.is_matrix else tensor
    return renamed, unknown


def _reshaped(tensor: Tensor, naming: str) -> Tensor:
    """The weight of a linear layer in the shape of ``naming``. Unexpected shapes stay and fail the later check."""
    if naming == "timm":
        return tensor[..., None, None] if tensor.ndim == 2 else tensor
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def count_known(tensors: Mapping[str, Tensor], naming: str) -> int:
    """The number of tensors with a name of ``naming``; weights of linear layers must also have its rank."""
    count = 0
    for name, tensor in tensors.items():
        key = parse(name, naming)
        if key is not None:
            count += not key.is_matrix or tensor.ndim == (4 if naming == "timm" else 2)
    return count


def has_post_norms(names: Iterable[str]) -> bool:
    """Whether timm's ``names`` show that LayerNorm comes after the branches."""
    return any((key := parse(name, "timm")) is not None and key.is_post_norm for name in names)

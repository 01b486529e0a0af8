"""What a FocalNet's tensors are called in each published naming: one table, read in every direction.

Three namings exist: "transformers", "authors" (microsoft/FocalNet, classification and detection) and "timm". Names of
transformers stand here without the "focalnet." that models with a head put before the body's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ..fusion.part_names import MODULATION

NAMINGS = ("transformers", "authors", "timm")


@dataclass(frozen=True)
class Row:
    """One module or parameter, by its name in each naming; None where that naming has no place for it.

    ``{stage}``, ``{layer}`` and ``{level}`` stand for numbers from 0 and ``{stage+1}`` for one more; ``{post}`` is
    "_post" where LayerNorm comes after a branch, else nothing. ``pointwise`` marks what is a linear layer for
    transformers and the authors, and a 1x1 convolution for timm.
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
    _in_block("gamma_1", "gamma_1", "ls1.gamma"),
    _in_block("gamma_2", "gamma_2", "ls2.gamma"),
    # timm counts a downsampling to the stage that it leads to.
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
    """The rows that ``naming`` has, each with what recognises its keys."""
    patterns = []
    for row in TABLE:
        if (template := getattr(row, naming)) is not None:
            pieces = re.split(r"(\{[^}]*\})", template)
            body = "".join(_PLACES.get(piece, re.escape(piece)) for piece in pieces)
            patterns.append((row, re.compile(body + r"(?P<suffix>(?:\.weight|\.bias)?)")))
    return tuple(patterns)


@dataclass(frozen=True)
class Key:
    """A name taken apart: its row of the table and what stood in the row's places."""

    row: Row
    suffix: str
    stage: int = 0
    layer: int = 0
    level: int = 0
    is_post_norm: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether this is the weight of a linear layer that timm has as a 1x1 convolution."""
        return self.row.pointwise and self.suffix == ".weight"

    def named(self, naming: str, post_norm: bool = False) -> str | None:
        """The name in ``naming``, or None where it has none."""
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
    """``name`` of ``naming`` taken apart; None if the table does not know it."""
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
    """Tensors of naming ``source`` under their names in ``target``, linear layers reshaped as that wants them.

    ``post_norm`` says that LayerNorm comes after the branches, which timm's names tell. No value changes, and going
    back gives the same names and tensors.

    Returns:
        What was renamed, and what could not be: unknown to ``source``, or without a place in ``target``.
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
    """The weight of a linear layer as ``naming`` has it; another shape is left for the check of shapes to report."""
    if naming == "timm":
        return tensor[..., None, None] if tensor.ndim == 2 else tensor
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def count_known(tensors: Mapping[str, Tensor], naming: str) -> int:
    """How many tensors have a name and, where a linear layer tells the namings apart, a rank of ``naming``."""
    count = 0
    for name, tensor in tensors.items():
        key = parse(name, naming)
        if key is not None:
            count += not key.is_matrix or tensor.ndim == (4 if naming == "timm" else 2)
    return count


def has_post_norms(names: Iterable[str]) -> bool:
    """Whether timm's ``names`` say that LayerNorm comes after the branches."""
    return any((key := parse(name, "timm")) is not None and key.is_post_norm for name in names)

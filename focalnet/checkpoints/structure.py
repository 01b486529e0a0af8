"""Infers a FocalNet's configuration from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..variants import VARIANTS

# Fields that change results but not shapes. timm's names determine the second; more than one stage, the third.
UNSETTLED_BY_SHAPES = {
    "normalize_modulator": "whether the aggregated context is divided by L + 1",
    "use_post_layernorm": "whether LayerNorm comes after the branches",
    "use_conv_embed": "whether a 7x7 stem has stride 4 or its patches do not overlap",
}
# Fields that identify a published variant: all that shapes determine, except those of the head and the image.
_STRUCTURE = (
    "embed_dim",
    "depths",
    "focal_levels",
    "focal_windows",
    "patch_size",
    "use_conv_embed",
    "use_layerscale",
    "use_post_layernorm_in_modulation",
    "use_post_layernorm",
)
# The padding in FocalNet-DINO, detrex, MaskDINO, X-Decoder and Relation-DETR. The authors' mmdet and mmseg code uses
# 3, but none of its published configurations has the overlapping stem.
USUAL_STEM_PADDING = 2
# Formats whose models drop incomplete patches: timm's and the authors' classifiers. The authors' detectors pad.
DROPPING_FORMATS = ("timm", "authors")
# First window of the tiny, small and base variants in the authors' detection configurations.
_DETECTION_WINDOW = 9

Shape = tuple[int, ...]


class _Shapes:
    """Shapes by name, queried by pattern. If tensors disagree, the majority decides; the check of shapes reports the
    others later.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def vote(self, pattern: str, value: Callable[[Shape], Any], ndim: int) -> Any | None:
        votes = Counter(
            value(shape) for name, shape in self._shapes.items() if len(shape) == ndim and re.fullmatch(pattern, name)
        )
        return votes.most_common(1)[0][0] if votes else None

    def count(self, pattern: str) -> int:
        """One more than the highest number matched by the pattern's group; 0 if nothing matches."""
        return max((int(m[1]) + 1 for name in self._shapes if (m := re.match(pattern, name))), default=0)

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self._shapes)


def infer_fields(tensors: Mapping[str, Tensor], kind: str, format: str) -> dict[str, Any]:
    """Arguments of FocalNetConfig that follow from names and shapes; all others are omitted.

    Args:
        tensors: in transformers' naming, without "focalnet." before the body.
        kind: one of KINDS.
        format: one of FORMATS.
    """
    shapes = _Shapes(tensors)
    stages = shapes.count(r"encoder\.stages\.(\d+)\.layers\.")
    embed_dim = shapes.vote(_layers(0) + r"norm[12]\.(weight|bias)", lambda shape: shape[0], 1)
    fields: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depths": [shapes.count(rf"encoder\.stages\.{stage}\.layers\.(\d+)\.") for stage in range(stages)],
        "focal_windows": _of_all(_window(shapes, stage) for stage in range(stages)),
        "use_layerscale": shapes.has(r"encoder\..*\.gamma_[12]$"),
        "use_post_layernorm_in_modulation": shapes.has(r"encoder\..*\.modulation\.layernorm\."),
    }
    if embed_dim is not None and stages:
        dims = [embed_dim * 2**stage for stage in range(stages)]
        fields["hidden_sizes"] = [*dims[1:], dims[-1]]
        fields["focal_levels"] = _of_all(_levels(shapes, stage, dim) for stage, dim in enumerate(dims))
        fields["mlp_ratio"] = _mlp_ratio(shapes, dims)
    fields.update(_stem(shapes, stages))
    fields.update(_outputs(shapes, kind, format, fields))
    return {name: value for name, value in fields.items() if value is not None}


def matching_variants(fields: Mapping[str, Any], format: str) -> list[str]:
    """The published variants that agree with ``fields``; exactly one for a published checkpoint."""
    if fields.get("mlp_ratio", 4.0) != 4.0:
        return []
    matching = []
    for name, variant in VARIANTS.items():
        published = variant.config_fields()
        enlarged = format == "authors-detection" and not variant.use_conv_embed
        if enlarged and set(fields.get("focal_windows", ())) == {_DETECTION_WINDOW}:
            published["focal_windows"] = list(fields["focal_windows"])
        if all(fields[field] == published[field] for field in _STRUCTURE if field in fields):
            matching.append(name)
    return matching


def _layers(stage: int) -> str:
    return rf"encoder\.stages\.{stage}\.layers\.\d+\."


def _of_all(values: Iterable[Any]) -> list[Any] | None:
    values = list(values)
    return values if values and None not in values else None


def _window(shapes: _Shapes, stage: int) -> int | None:
    first = _layers(stage) + r"modulation\.focal_layers\.0\.0\.weight"
    return shapes.vote(first, lambda shape: shape[-1], 4)


def _levels(shapes: _Shapes, stage: int, dim: int) -> int | None:
    # The projection's 2 dim + L + 1 outputs: query, context and gates.
    projected = shapes.vote(_layers(stage) + r"modulation\.projection_in\.bias", lambda s: s[0], 1)
    levels = None if projected is None else projected - 2 * dim - 1
    if levels is None or levels < 1:
        levels = shapes.count(_layers(stage) + r"modulation\.focal_layers\.(\d+)\.") or None
    return levels


def _mlp_ratio(shapes: _Shapes, dims: Sequence[int]) -> float | None:
    """The ratio with the fewest digits that gives every stage its hidden size, ``int(dim * ratio)``."""
    hidden = [shapes.vote(_layers(stage) + r"mlp\.fc1\.bias", lambda shape: shape[0], 1) for stage in range(len(dims))]
    pairs = [(dim, size) for dim, size in zip(dims, hidden, strict=True) if size is not None]
    if not pairs:
        return None
    least = max(size / dim for dim, size in pairs)
    for digits in range(12):
        ratio = math.ceil(round(least * 10**digits, 6)) / 10**digits
        if all(int(dim * ratio) == size for dim, size in pairs):
            return ratio
    return least


def _stem(shapes: _Shapes, stages: int) -> dict[str, Any]:
    projection = r"embeddings\.patch_embeddings\.projection\.weight"
    kernel = shapes.vote(projection, lambda shape: shape[2:], 4)
    downsampling = shapes.vote(r"encoder\.stages\.\d+\.downsample\.projection\.weight", lambda shape: shape[2:], 4)
    if downsampling is not None:
        overlaps = downsampling == (3, 3)
    else:  # with a single stage, only a 7x7 stem can overlap
        overlaps = None if kernel in (None, (7, 7)) else False
    fields = {"num_channels": shapes.vote(projection, lambda shape: shape[1], 4), "use_conv_embed": overlaps}
    if overlaps:
        kernel = (4, 4)  # the stride of the overlapping stem
    if overlaps is not None and kernel is not None:
        fields["patch_size"] = kernel[0] if kernel[0] == kernel[1] else list(kernel)
    return fields


def _outputs(shapes: _Shapes, kind: str, format: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that concern heads and feature maps."""
    outputs: dict[str, Any] = {}
    patch_size = fields.get("patch_size")
    if isinstance(patch_size, int):
        outputs["encoder_stride"] = patch_size * 2 ** max(len(fields["depths"]) - 1, 0)
    if kind == "classifier":
        outputs["num_labels"] = shapes.vote(r"classifier\.(weight|bias)", lambda shape: shape[0], 2)
    if kind == "masked-image-modeling" and fields.get("num_channels"):
        pixels = shapes.vote(r"decoder\.0\.weight", lambda shape: shape[0] // fields["num_channels"], 4)
        outputs["encoder_stride"] = None if pixels is None else math.isqrt(pixels)
    if format == "authors-detection":
        stages = (f"stage{stage}" for stage in range(1, len(fields["depths"]) + 1))
        outputs["out_features"] = [stage for stage in stages if shapes.has(rf"hidden_states_norms\.{stage}\.")]
        outputs["feature_maps_before_downsampling"] = True
        outputs["use_feature_map_norms"] = True
        outputs["stem_padding"] = USUAL_STEM_PADDING if fields.get("use_conv_embed") else None
    outputs["drop_incomplete_patches"] = True if format in DROPPING_FORMATS else None
    return outputs

"""Recognises a state dict: the naming of its tensors, the prefix of the FocalNet in it, and the kind of model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .foreign import refuse_by_name
from .key_maps import NAMINGS, count_known, has_post_norms, rename
from .structure import infer_fields

FORMATS = ("transformers", "authors", "authors-detection", "timm")
# Kinds of models, with the class named in transformers' config.json.
KINDS = {
    "classifier": "FocalNetForImageClassification",
    "masked-image-modeling": "FocalNetForMaskedImageModeling",
    "backbone": "FocalNetBackbone",
    "base": "FocalNetModel",
}
# Prefixes of the body, which is the same in every model. All other parts may be missing or new in a model.
BODY = ("embeddings.patch_embeddings.", "embeddings.norm.", "encoder.")
_PREFIXED = ("embeddings.", "encoder.", "layernorm.")
# The beginning of a FocalNet's names, after any prefix that a larger model added ("outer").
_BEGINNING = re.compile(
    r"(?P<outer>(?:[^.]+\.)*?)(?P<own>focalnet\.)?"
    r"(?:embeddings\.patch_embeddings|encoder\.stages\.\d+\.layers|patch_embed|stem|layers\.\d+\.blocks)\."
)
_NETWORK_BEFORE_NORMS = re.compile(r"(?P<outer>(?:[^.]+\.)*?)0\.(?:patch_embed|layers\.\d+\.blocks)\.")
_SHOWN = 8


def naming_of(format: str) -> str:
    """The naming that a format uses. Detection backbones use the authors' naming."""
    return "authors" if format == "authors-detection" else format


def bare_name(name: str) -> str:
    """A name of transformers without the "focalnet." prefix of the body."""
    return name.removeprefix("focalnet.")


def shortened(items: Iterable[str], shown: int = _SHOWN) -> str:
    """``items`` joined by commas; a long list is cut after ``shown`` items, with the number of the others."""
    items = list(items)
    more = f", ... and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


@dataclass(frozen=True)
class Taken:
    """An analysed file.

    Attributes:
        format: one of FORMATS.
        kind: one of KINDS.
        canonical: tensors in transformers' naming, without "focalnet." before the body.
        unknown: tensors without a name in that naming.
        known: inferred arguments of FocalNetConfig.
        notes: choices made, for the user.
    """

    format: str
    kind: str
    canonical: dict[str, Tensor]
    unknown: dict[str, Tensor]
    known: dict[str, Any]
    notes: tuple[str, ...]


def take_apart(
    tensors: Mapping[str, Tensor], source: str, published: dict[str, Any] | None, given: Mapping[str, Any]
) -> Taken:
    tensors = _with_norms_inside(tensors)
    format, outer = recognise(tensors, source)
    own = {name.removeprefix(outer): tensor for name, tensor in tensors.items() if name.startswith(outer)}
    refuse_by_name(own, source)
    naming = naming_of(format)
    is_prefixed = any(name.startswith("focalnet.") for name in own)
    bare = {bare_name(name): tensor for name, tensor in own.items()} if naming == "transformers" else own
    post_norm = has_post_norms(bare) if naming == "timm" else False
    canonical, unknown = rename(bare, naming, "transformers", post_norm)
    kind = _kind(canonical, is_prefixed, published)
    if format == "authors-detection":
        canonical = _chosen_norms(canonical, given)
    known = infer_fields(canonical, kind, format)
    if naming == "timm":
        known["use_post_layernorm"] = post_norm
    return Taken(format, kind, canonical, unknown, known, _dropped(tensors, outer))


def _with_norms_inside(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Move the map norms of Relation-DETR and Salience-DETR from ``backbone.1`` to the network in ``backbone.0``."""
    network = next((match["outer"] for name in tensors if (match := _NETWORK_BEFORE_NORMS.match(name))), None)
    if network is None:
        return tensors
    norm = re.compile(re.escape(f"{network}1.") + r"(norm\d+\.(?:weight|bias))")
    return {f"{network}0.{match[1]}" if (match := norm.fullmatch(name)) else name: t for name, t in tensors.items()}


def recognise(tensors: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """(format, prefix of the FocalNet's names). The naming that knows most of the names determines the format.

    Raises:
        ValueError: no naming knows any of the names.
    """
    beginnings = Counter(match["outer"] for name in tensors if (match := _BEGINNING.match(name)) is not None)
    outer = beginnings.most_common(1)[0][0] if beginnings else ""
    own = {bare_name(name.removeprefix(outer)): t for name, t in tensors.items() if name.startswith(outer)}
    known = {naming: count_known(own, naming) for naming in NAMINGS}
    naming = max(known, key=known.__getitem__)
    if not beginnings or not known[naming]:
        raise ValueError(
            f"{source}: expected the keys of a FocalNet, as transformers, its authors or timm name them, got "
            f"{shortened(tensors)}"
        )
    has_map_norms = any(re.fullmatch(r"norm\d+\.(weight|bias)", name) for name in own)
    return ("authors-detection" if naming == "authors" and has_map_norms else naming), outer


def _dropped(tensors: Mapping[str, Tensor], outer: str) -> tuple[str, ...]:
    dropped = Counter(name.split(".")[0] for name in tensors if not name.startswith(outer))
    if not dropped:
        return ()
    parts = shortened(f"{name} ({count} tensors)" for name, count in dropped.items())
    return (f"took the FocalNet under {outer!r} and dropped the rest of the model: {parts}",)


def _kind(canonical: Mapping[str, Tensor], is_prefixed: bool, published: dict[str, Any] | None) -> str:
    named = (published or {}).get("architectures") or []
    for kind, class_name in KINDS.items():
        if class_name in named:
            return kind
    parts = {name.split(".")[0] for name in canonical}
    if "classifier" in parts:
        return "classifier"
    if "decoder" in parts:
        return "masked-image-modeling"
    return "backbone" if is_prefixed or "hidden_states_norms" in parts else "base"


def prefixed(name: str) -> str:
    return f"focalnet.{name}" if name.startswith(_PREFIXED) else name


def _chosen_norms(canonical: dict[str, Tensor], config_fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without the norms of maps that the caller did not select."""
    chosen = config_fields.get("out_features")
    if chosen is None and config_fields.get("out_indices") is not None:
        chosen = ["stem" if index == 0 else f"stage{index}" for index in config_fields["out_indices"]]
    if chosen is None:
        return canonical
    return {
        n: t for n, t in canonical.items() if not n.startswith("hidden_states_norms.") or n.split(".")[1] in chosen
    }

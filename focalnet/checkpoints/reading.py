"""Checkpoints in every published format: recognised by their keys, their configuration inferred from their shapes.

Formats: "transformers"; "authors" (microsoft/FocalNet's classifiers); "authors-detection" (its detection backbones,
with a norm for each output); "timm". `focalnet.checkpoints.loading` makes models of what is read here.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import FocalNetConfig
from ..variants import VARIANTS
from .files import read_directory, read_json, read_tensors
from .key_maps import NAMINGS, count_known, has_post_norms, rename
from .structure import UNSETTLED_BY_SHAPES, infer_fields, matching_variants

logger = logging.getLogger(__name__)

FORMATS = ("transformers", "authors", "authors-detection", "timm")
# What a checkpoint holds, and the class that transformers' config.json names for it.
KINDS = {
    "classifier": "FocalNetForImageClassification",
    "masked-image-modeling": "FocalNetForMaskedImageModeling",
    "backbone": "FocalNetBackbone",
    "base": "FocalNetModel",
}
# Parts that models may lack or have anew; everything else is the body, the same in every model.
_BODY = ("embeddings.patch_embeddings.", "embeddings.norm.", "encoder.")
_PREFIXED = ("embeddings.", "encoder.", "layernorm.")
# Where a state dict's names begin, behind whatever a larger model put before them.
_BEGINNING = re.compile(
    r"(?P<outer>(?:[^.]+\.)*?)(?P<own>focalnet\.)?"
    r"(?:embeddings\.patch_embeddings|encoder\.stages\.\d+\.layers|patch_embed|stem|layers\.\d+\.blocks)\."
)
_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    format: one of FORMATS. kind: one of KINDS. config: read from config.json or inferred. state_dict: in
    transformers' naming, as the class of ``kind`` has it. unknown: tensors whose names the format does not have.
    source: where it came from, for messages.
    """

    format: str
    kind: str
    config: FocalNetConfig
    state_dict: dict[str, Tensor]
    source: str
    unknown: dict[str, Tensor] = field(default_factory=dict)

    def verify(self, expected: Mapping[str, Tensor], body_only: bool = False) -> None:
        """Check names and shapes against ``expected``, the state dict of the model to be filled (meta tensors do).

        Args:
            expected: in transformers' naming.
            body_only: leave out heads, which another class of model may have or lack.

        Raises:
            ValueError: listing everything that is missing, unexpected or mis-shaped, in the file's own naming.
        """
        held = {**self._in_own_naming(self.state_dict, body_only), **self.unknown}
        shapes = {name: tuple(t.shape) for name, t in held.items()}
        wanted = {name: tuple(t.shape) for name, t in self._in_own_naming(expected, body_only).items()}
        missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in shapes]
        unexpected = [f"{name} {shape}" for name, shape in shapes.items() if name not in wanted]
        misshaped = [
            f"{name} is {shapes[name]}, expected {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ]
        problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
        if any(problems.values()):
            listed = "".join(f"\n  {len(p)} {what}: {shortened(p)}" for what, p in problems.items() if p)
            raise ValueError(
                f"{self.source}: does not fit the model of its configuration ({self.format} format):{listed}\n"
                f"Pass the `variant` or the configuration fields that it was trained with, or a complete file."
            )

    def _in_own_naming(self, state_dict: Mapping[str, Tensor], body_only: bool) -> dict[str, Tensor]:
        bare = {bare_name(name): tensor for name, tensor in state_dict.items()}
        if body_only:
            bare = {name: tensor for name, tensor in bare.items() if name.startswith(_BODY)}
        renamed, without_place = rename(bare, "transformers", naming_of(self.format), self.config.use_post_layernorm)
        return {**renamed, **without_place}


def naming_of(format: str) -> str:
    """The naming that a format uses: detection backbones have the authors'."""
    return "authors" if format == "authors-detection" else format


def bare_name(name: str) -> str:
    """A name of transformers without the "focalnet." before the body."""
    return name.removeprefix("focalnet.")


def shortened(items: Iterable[str], shown: int = _SHOWN) -> str:
    """``items`` joined; of a long list only the beginning, and how many more there are."""
    items = list(items)
    more = f", ... and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def read_checkpoint(
    path: str | os.PathLike,
    *,
    variant: str | None = None,
    config: FocalNetConfig | None = None,
    **config_fields: Any,
) -> Checkpoint:
    """Read a file of any format, or a directory as save_pretrained writes it.

    A directory's config.json decides the configuration, and so it does for a file in transformers' naming beside
    it. Otherwise it is inferred from shapes; what those cannot tell comes from ``config_fields``, else ``variant``,
    else the one published variant with that structure.

    Args:
        path: a file (safetensors, or written by torch.save) or a directory.
        variant: name of a published variant, such as "large_fl4".
        config: the configuration, if it is known; nothing is inferred then.
        config_fields: arguments of FocalNetConfig.

    Raises:
        ValueError: the file is damaged or refused, is no FocalNet, contradicts ``variant`` or ``config_fields``, or
            does not tell its whole configuration; the message says what to pass.
        OSError: the file cannot be read.
    """
    path = Path(path)
    tensors = read_directory(path) if path.is_dir() else read_tensors(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    published = None
    if config is None and beside.is_file() and (path.is_dir() or recognise(tensors, str(path))[0] == "transformers"):
        published = read_json(beside)
    elif config is not None:
        published = config.to_dict()
    # timm's directories have a config.json as well, of another kind.
    if published is not None and published.get("model_type") != FocalNetConfig.model_type:
        published = None
    return interpret(tensors, str(path), variant=variant, published=published, **config_fields)


def interpret(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    variant: str | None = None,
    published: dict[str, Any] | None = None,
    **config_fields: Any,
) -> Checkpoint:
    """What `read_checkpoint` makes of a file's tensors; ``published`` is the content of its config.json."""
    check_arguments(variant, config_fields)
    format, kind, canonical, unknown, known = _take_apart(tensors, source, published, config_fields)
    config = _configuration(known, format, source, variant, published, config_fields)
    named = canonical if kind == "base" else {_prefixed(name): tensor for name, tensor in canonical.items()}
    return Checkpoint(format, kind, config, named, source, unknown)


def told_fields(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of FocalNetConfig as a reader of ``tensors`` alone finds them; what stays open is not among them."""
    format, _, _, _, known = _take_apart(tensors, source, None, {})
    return _merged(known, {}, format, None)[0]


def _take_apart(
    tensors: Mapping[str, Tensor], source: str, published: dict[str, Any] | None, given: Mapping[str, Any]
) -> tuple[str, str, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(format, kind, tensors in transformers' bare naming, tensors without place there, inferred fields)."""
    format, outer = recognise(tensors, source)
    own = _without_prefix(tensors, outer, source)
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
    return format, kind, canonical, unknown, known


def recognise(tensors: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """(format, what stands before its names): the naming that knows most of the names.

    Raises:
        ValueError: no naming knows any.
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


def _without_prefix(tensors: Mapping[str, Tensor], outer: str, source: str) -> dict[str, Tensor]:
    own = {name.removeprefix(outer): tensor for name, tensor in tensors.items() if name.startswith(outer)}
    dropped = Counter(name.split(".")[0] for name in tensors if not name.startswith(outer))
    if dropped:
        logger.warning(
            "%s: took the FocalNet under %r and dropped the rest of the model: %s",
            source,
            outer,
            shortened(f"{name} ({count} tensors)" for name, count in dropped.items()),
        )
    return own


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


def _prefixed(name: str) -> str:
    return f"focalnet.{name}" if name.startswith(_PREFIXED) else name


def _chosen_norms(canonical: dict[str, Tensor], config_fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the norms of maps that the caller does not want."""
    chosen = config_fields.get("out_features")
    if chosen is None and config_fields.get("out_indices") is not None:
        chosen = ["stem" if index == 0 else f"stage{index}" for index in config_fields["out_indices"]]
    if chosen is None:
        return canonical
    return {
        n: t for n, t in canonical.items() if not n.startswith("hidden_states_norms.") or n.split(".")[1] in chosen
    }


@cache
def _field_names() -> frozenset[str]:
    own = set(inspect.signature(FocalNetConfig.__init__).parameters) - {"self", "kwargs"}
    return frozenset(own | {name for name in vars(FocalNetConfig()) if not name.startswith("_")} | {"num_labels"})


def check_arguments(variant: str | None, config_fields: Mapping[str, Any]) -> None:
    """ValueError for a variant that is not published, TypeError for an argument that is no configuration field."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if strange := sorted(set(config_fields) - _field_names()):
        raise TypeError(
            f"{', '.join(strange)}: not a field of FocalNetConfig; expected fields such as depths, num_labels"
        )


def _configuration(
    known: dict[str, Any],
    format: str,
    source: str,
    variant: str | None,
    published: dict[str, Any] | None,
    given: dict[str, Any],
) -> FocalNetConfig:
    _check_agreement(known, given, "argument", source)
    if variant is not None:
        told = {name: value for name, value in _told_by(variant, format).items() if name not in given}
        _check_agreement({**known, **(published or {})}, told, f"variant {variant!r}", source)
    if published is not None:
        return FocalNetConfig.from_dict(published, **given)
    fields, matching = _merged(known, given, format, variant)
    _check_complete(fields, source)
    _check_settled(fields, matching, format, source)
    # Only a 7x7 stem does not tell its patches; its stride is 4 or 7.
    fields.setdefault("patch_size", 4 if fields["use_conv_embed"] else 7)
    try:
        return FocalNetConfig(**_agreeing_outputs(fields, given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: the file and the arguments give no valid configuration: {error}") from None


def _merged(
    known: Mapping[str, Any], given: Mapping[str, Any], format: str, variant: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(what is given, else inferred, else the variant's; the variants it could be)."""
    matching = matching_variants({**known, **given}, format) if variant is None else [variant]
    usual = {"num_channels": 3, "mlp_ratio": 4.0}
    fields = {**usual, **VARIANTS[matching[0]].config_fields()} if len(matching) == 1 else {}
    return {**fields, **known, **given}, matching


# Fields that do not contradict a file: a fine-tuned model changes them, only training uses them, shapes do not show
# them, or the check of shapes says it better.
_FREE = {
    "num_labels",
    "image_size",
    "drop_path_rate",
    "encoder_stride",
    "hidden_sizes",
    "num_channels",
    "mlp_ratio",
    "stem_padding",
    "feature_maps_before_downsampling",
    "out_features",
    "out_indices",
}


def _told_by(variant: str, format: str) -> dict[str, Any]:
    """The fields in which a file must agree with its variant."""
    fields = {name: v for name, v in VARIANTS[variant].config_fields().items() if name not in _FREE}
    if format == "authors-detection":
        del fields["focal_windows"]  # detection enlarged them
    return fields


def _check_agreement(known: Mapping[str, Any], told: Mapping[str, Any], by: str, source: str) -> None:
    differing = [
        f"{name} is {told[name]} by the {by}, but {known[name]} in the file"
        for name in told
        if name in known and name not in _FREE and comparable(name, told[name]) != comparable(name, known[name])
    ]
    if differing:
        raise ValueError(f"{source}: {'; '.join(differing)}. Pass what the file was trained with, or leave it out")


def comparable(name: str, value: Any) -> Any:
    """A field's value such that equal settings are equal: lists for tuples, a patch's size as a pair."""
    if name == "patch_size" and isinstance(value, int):
        return [value, value]
    return list(value) if isinstance(value, (list, tuple)) else value


_OUTPUTS = ("out_features", "out_indices")


def _agreeing_outputs(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the inferred outputs where the caller chose some by the other name."""
    inferred = [name for name in _OUTPUTS if name not in given]
    chosen = len(inferred) < len(_OUTPUTS)
    return {name: value for name, value in fields.items() if not (chosen and name in inferred)}


def _check_complete(fields: Mapping[str, Any], source: str) -> None:
    """Raise where tensors are missing that would tell a field: its default would be a guess."""
    needed = ("embed_dim", "depths", "focal_levels", "focal_windows", "num_channels", "mlp_ratio")
    if untold := [name for name in needed if not fields.get(name)]:
        raise ValueError(
            f"{source}: no tensor tells {', '.join(untold)}, since too many are missing; use a complete file, or pass "
            f"{' and '.join(f'{name}=' for name in untold)}"
        )


def _check_settled(fields: Mapping[str, Any], matching: list[str], format: str, source: str) -> None:
    """Raise for every field that neither the file nor an argument nor a variant settles."""
    open_fields = {name: why for name, why in UNSETTLED_BY_SHAPES.items() if name not in fields}
    if not open_fields:
        return
    if len(matching) == 1:
        cause = f"published sources of {matching[0]} contradict each other in it"
    else:
        structure = {name: fields[name] for name in ("embed_dim", "depths", "focal_levels", "focal_windows")}
        cause = f"no published variant settles it for {', '.join(f'{k}={v}' for k, v in structure.items())}"
    wanted = "; ".join(f"{name}=True or {name}=False ({why})" for name, why in open_fields.items())
    # A classifier's variant would have been found by its structure; detection changes windows, so naming it helps.
    could_be_named = not matching and format == "authors-detection"
    other = f", or variant=, one of {', '.join(VARIANTS)}" if could_be_named else ""
    raise ValueError(
        f"{source}: the weights ({format} format) do not tell {' and '.join(open_fields)}, and {cause}. "
        f"Pass {wanted}{other}"
    )


def pretrained_arguments(
    model_class: Callable[[FocalNetConfig], Any], path: str | os.PathLike, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments for from_pretrained(None, ...) that fill a ``model_class`` from a file of any format.

    Heads that the class lacks or has anew are left for from_pretrained to report, as for any of its checkpoints.

    Args:
        arguments: those of from_pretrained: ``config``, ``variant`` and fields of the configuration are used here.

    Raises:
        ValueError, TypeError, OSError: as `read_checkpoint`, or the body does not fit.
    """
    rest = dict(arguments)
    config, variant = rest.pop("config", None), rest.pop("variant", None)
    if isinstance(config, (str, os.PathLike)):
        config = FocalNetConfig.from_pretrained(config)
    given = {name: rest.pop(name) for name in arguments if name in _field_names() and name != "dtype"}
    checkpoint = read_checkpoint(path, variant=variant, config=config, **given)
    with torch.device("meta"):
        checkpoint.verify(model_class(checkpoint.config).state_dict(), body_only=True)
    return {**rest, "config": checkpoint.config, "state_dict": checkpoint.state_dict}

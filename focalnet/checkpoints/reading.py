"""Checkpoints in every published format: recognised by their keys, their configuration inferred from their shapes.

Formats: "transformers"; "authors" (microsoft/FocalNet's classifiers); "authors-detection" (its detection backbones,
with a norm for each output); "timm". `focalnet.models.loading` makes models of what is read here.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import FocalNetConfig
from ..variants import VARIANTS
from .files import read_json, read_weights, weights_of_directory
from .foreign import check_architecture, configuration_in
from .imagenet import class_names
from .key_maps import rename
from .recognition import BODY, Taken, bare_name, naming_of, prefixed, recognise, shortened, take_apart
from .structure import UNSETTLED_BY_SHAPES, USUAL_STEM_PADDING, matching_variants

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    format: one of FORMATS. kind: one of KINDS. config: read from config.json or inferred. state_dict: in
    transformers' naming, as the class of ``kind`` has it. unknown: tensors whose names the format does not have.
    source: where it came from, for messages. notes: choices that were made in reading it, for the user.
    """

    format: str
    kind: str
    config: FocalNetConfig
    state_dict: dict[str, Tensor]
    source: str
    unknown: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
            bare = {name: tensor for name, tensor in bare.items() if name.startswith(BODY)}
        renamed, without_place = rename(bare, "transformers", naming_of(self.format), self.config.use_post_layernorm)
        return {**renamed, **without_place}

    def tell(self) -> None:
        """Log the notes, for a user who sees nothing but the model."""
        for note in self.notes:
            logger.warning("%s: %s", self.source, note)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    config: FocalNetConfig | None = None,
    use_ema: bool | None = None,
    overriding: bool = False,
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
        use_ema: the averaged weights of a training script's file (True), the plain ones (False), or the averaged
            where there are any (None).
        overriding: let ``config_fields`` contradict the file.
        config_fields: arguments of FocalNetConfig.

    Raises:
        ValueError: the file is damaged or refused, is no FocalNet, contradicts ``variant`` or ``config_fields``, or
            does not tell its whole configuration; the message says what to pass.
        OSError: the file cannot be read.
    """
    path = Path(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_dir() and config is None:
        check_architecture(path, configuration_in(path))
    weights = weights_of_directory(path, use_ema) if path.is_dir() else read_weights(path, use_ema)
    published = None
    if config is not None:
        published = config.to_dict()
    elif beside.is_file() and (path.is_dir() or recognise(weights.tensors, str(path))[0] == "transformers"):
        published = read_json(beside)
    # timm's directories have a config.json as well, of another kind.
    if published is not None and published.get("model_type") != FocalNetConfig.model_type:
        published = None
    return interpret(
        weights.tensors,
        str(path),
        variant=variant,
        published=published,
        overriding=overriding,
        notes=weights.notes,
        **config_fields,
    )


def interpret(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    variant: str | None = None,
    published: dict[str, Any] | None = None,
    overriding: bool = False,
    notes: tuple[str, ...] = (),
    **config_fields: Any,
) -> Checkpoint:
    """What `read_checkpoint` makes of a file's tensors; ``published`` is the content of its config.json."""
    check_arguments(variant, config_fields)
    taken = take_apart(tensors, source, published, config_fields)
    config = _configuration(taken, source, variant, published, config_fields, overriding)
    state_dict = taken.canonical
    if taken.kind != "base":
        state_dict = {prefixed(name): tensor for name, tensor in state_dict.items()}
    notes += taken.notes
    if "stem_padding" in taken.known and published is None and "stem_padding" not in config_fields:
        notes += (
            f"took stem_padding={USUAL_STEM_PADDING}, which FocalNet-DINO, detrex, MaskDINO, X-Decoder and "
            f"Relation-DETR have; a model of the authors' mmdet or mmseg code needs stem_padding=3",
        )
    return Checkpoint(taken.format, taken.kind, config, state_dict, source, taken.unknown, notes)


def told_fields(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of FocalNetConfig as a reader of ``tensors`` alone finds them; what stays open is not among them."""
    taken = take_apart(tensors, source, None, {})
    return _merged(taken.known, {}, taken.format, None)[0]


# Fields that from_pretrained takes by itself.
_OF_THE_MODEL = frozenset({"dtype", "attn_implementation"})


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
    taken: Taken,
    source: str,
    variant: str | None,
    published: dict[str, Any] | None,
    given: dict[str, Any],
    overriding: bool,
) -> FocalNetConfig:
    known, format = taken.known, taken.format
    if not overriding:
        _check_agreement(known, given, "argument", source)
    if variant is not None:
        told = {name: value for name, value in _told_by(variant, format).items() if name not in given}
        _check_agreement({**known, **(published or {})}, told, f"variant {variant!r}", source)
    if published is not None:
        left_open = published.get("drop_incomplete_patches") is None and "drop_incomplete_patches" in known
        told = {"drop_incomplete_patches": known["drop_incomplete_patches"]} if left_open else {}
        return FocalNetConfig.from_dict({**published, **told}, **given)
    labels = {name: given[name] for name in _LABELS if name in given}
    config = _inferred(taken, source, variant, {name: given[name] for name in given if name not in labels})
    # As for a directory, where from_pretrained puts its arguments over what config.json says.
    return FocalNetConfig.from_dict(config.to_dict(), **labels) if labels else config


def _inferred(taken: Taken, source: str, variant: str | None, given: dict[str, Any]) -> FocalNetConfig:
    """The configuration of a file without one, its labels aside."""
    fields, matching = _merged(taken.known, given, taken.format, variant)
    _check_complete(fields, source)
    _check_settled(fields, matching, taken.format, source)
    # Only a 7x7 stem does not tell its patches; its stride is 4 or 7.
    fields.setdefault("patch_size", 4 if fields["use_conv_embed"] else 7)
    names = class_names(taken.known.get("num_labels"))
    if taken.format != "transformers" and names is not None:
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: index for index, name in enumerate(names)}
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


# What names the outputs of a head, and counts them.
_LABELS = ("num_labels", "id2label", "label2id")
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
    "drop_incomplete_patches",
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
    if name == "stem_padding" and value is None:
        return USUAL_STEM_PADDING
    if name == "drop_incomplete_patches":
        return bool(value)
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
    model_class: Callable[[FocalNetConfig], Any], path: str | os.PathLike[str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments for from_pretrained(None, ...) that fill a ``model_class`` from a file of any format.

    Heads that the class lacks or has anew are left for from_pretrained to report, as for any of its checkpoints.

    Args:
        arguments: those of from_pretrained: ``config``, ``variant``, ``use_ema`` and fields of the configuration are
            used here. With ``ignore_mismatched_sizes`` the fields may contradict the file, as they may a directory.

    Raises:
        ValueError, TypeError, OSError: as `read_checkpoint`, or the body does not fit.
    """
    rest = dict(arguments)
    config, variant, use_ema = rest.pop("config", None), rest.pop("variant", None), rest.pop("use_ema", None)
    if isinstance(config, (str, os.PathLike)):
        config = FocalNetConfig.from_pretrained(config)
    given = {name: rest.pop(name) for name in arguments if name in _field_names() and name not in _OF_THE_MODEL}
    any_size = bool(rest.get("ignore_mismatched_sizes"))
    checkpoint = read_checkpoint(path, variant=variant, config=config, use_ema=use_ema, overriding=any_size, **given)
    if not any_size:
        with torch.device("meta"):
            checkpoint.verify(model_class(checkpoint.config).state_dict(), body_only=True)
    checkpoint.tell()
    return {**rest, "config": checkpoint.config, "state_dict": checkpoint.state_dict}

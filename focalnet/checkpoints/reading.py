"""Reads checkpoints of every published format: recognises the format and infers the configuration.

Formats: "transformers"; "authors" (microsoft/FocalNet's classifiers); "authors-detection" (its detection backbones,
with a norm for each output); "timm". `focalnet.models.loading` builds models from the result.
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
    """The content of a checkpoint.

    Attributes:
        format: one of FORMATS.
        kind: one of KINDS.
        config: read from config.json or inferred.
        state_dict: in transformers' naming, for the class of ``kind``.
        source: path or id of the checkpoint, for messages.
        unknown: tensors whose names do not exist in the format.
        notes: choices made while reading, for the user.
    """

    format: str
    kind: str
    config: FocalNetConfig
    state_dict: dict[str, Tensor]
    source: str
    unknown: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def verify(self, expected: Mapping[str, Tensor], body_only: bool = False) -> None:
        """Check names and shapes against ``expected``, the state dict of the model that will be filled.

        Args:
            expected: in transformers' naming; meta tensors are enough.
            body_only: ignore heads, which other model classes may have or lack.

        Raises:
            ValueError: tensors are missing, unexpected or mis-shaped; the message lists all, in the file's naming.
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
        """Log the notes as warnings."""
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
    """Read a file of any format, or a directory written by save_pretrained.

    The configuration of a directory, or of a file in transformers' naming, comes from the config.json in the same
    folder. Otherwise it is inferred from shapes. Fields that shapes do not determine come from ``config_fields``, else
    from ``variant``, else from the only published variant with that structure.

    Args:
        path: a file (safetensors, or written by torch.save) or a directory.
        variant: name of a published variant, such as "large_fl4".
        config: the configuration, if it is known; then nothing is inferred.
        use_ema: which weights of a training script's file to read: True the averaged, False the plain, None the
            averaged if there are any.
        overriding: allow ``config_fields`` to contradict the file.
        config_fields: arguments of FocalNetConfig.

    Raises:
        ValueError: the file is damaged, refused or not a FocalNet, contradicts ``variant`` or ``config_fields``, or
            does not determine the whole configuration; the message says what to pass.
        TypeError: an argument is not a field of the configuration.
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
    # timm's directories have a config.json too, with other content.
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
    """The checkpoint for the tensors of a file; see `read_checkpoint`. ``published`` is the content of config.json."""
    check_arguments(variant, config_fields)
    taken = take_apart(tensors, source, published, config_fields)
    config = _configuration(taken, source, variant, published, config_fields, overriding)
    state_dict = taken.canonical
    if taken.kind != "base":
        state_dict = {prefixed(name): tensor for name, tensor in state_dict.items()}
    notes += taken.notes
    if "stem_padding" in taken.known and published is None and "stem_padding" not in config_fields:
        notes += (
            f"took stem_padding={USUAL_STEM_PADDING}, as in FocalNet-DINO, detrex, MaskDINO, X-Decoder and "
            f"Relation-DETR; a model of the authors' mmdet or mmseg code needs stem_padding=3",
        )
    return Checkpoint(taken.format, taken.kind, config, state_dict, source, taken.unknown, notes)


def told_fields(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of FocalNetConfig that can be inferred from ``tensors`` alone; undetermined ones are omitted."""
    taken = take_apart(tensors, source, None, {})
    return _merged(taken.known, {}, taken.format, None)[0]


# Fields that from_pretrained handles itself.
_OF_THE_MODEL = frozenset({"dtype", "attn_implementation"})


@cache
def _field_names() -> frozenset[str]:
    own = set(inspect.signature(FocalNetConfig.__init__).parameters) - {"self", "kwargs"}
    return frozenset(own | {name for name in vars(FocalNetConfig()) if not name.startswith("_")} | {"num_labels"})


def check_arguments(variant: str | None, config_fields: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown variant, TypeError for an argument that is not a configuration field."""
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
    # Labels override the file, as from_pretrained's arguments override config.json.
    return FocalNetConfig.from_dict(config.to_dict(), **labels) if labels else config


def _inferred(taken: Taken, source: str, variant: str | None, given: dict[str, Any]) -> FocalNetConfig:
    """The configuration of a file without config.json, before labels given by the caller."""
    fields, matching = _merged(taken.known, given, taken.format, variant)
    _check_complete(fields, source)
    _check_settled(fields, matching, taken.format, source)
    # Only for a 7x7 stem the shapes do not determine the patch size; its stride is 4 or 7.
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
    """(fields, variants that match). Each field is the given one, else the inferred one, else that of the variant."""
    matching = matching_variants({**known, **given}, format) if variant is None else [variant]
    usual = {"num_channels": 3, "mlp_ratio": 4.0}
    fields = {**usual, **VARIANTS[matching[0]].config_fields()} if len(matching) == 1 else {}
    return {**fields, **known, **given}, matching


# Fields that name and count the outputs of a head.
_LABELS = ("num_labels", "id2label", "label2id")
# Fields that are not checked against a file: fine-tuning changes them, only training uses them, shapes do not show
# them, or the check of shapes gives a better message.
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
        del fields["focal_windows"]  # the detection models have larger windows
    return fields


def _check_agreement(known: Mapping[str, Any], told: Mapping[str, Any], by: str, source: str) -> None:
    differing = [
        f"{name} is {told[name]} by the {by}, but {known[name]} in the file"
        for name in told
        if name in known and name not in _FREE and comparable(name, told[name]) != comparable(name, known[name])
    ]
    if differing:
        raise ValueError(f"{source}: {'; '.join(differing)}. Pass what the file was trained with, or omit it")


def comparable(name: str, value: Any) -> Any:
    """A field's value in a normal form, in which equal settings compare equal: lists, and patch sizes as pairs."""
    if name == "patch_size" and isinstance(value, int):
        return [value, value]
    if name == "stem_padding" and value is None:
        return USUAL_STEM_PADDING
    if name == "drop_incomplete_patches":
        return bool(value)
    return list(value) if isinstance(value, (list, tuple)) else value


_OUTPUTS = ("out_features", "out_indices")


def _agreeing_outputs(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without inferred out_features or out_indices if the caller gave the other one."""
    inferred = [name for name in _OUTPUTS if name not in given]
    chosen = len(inferred) < len(_OUTPUTS)
    return {name: value for name, value in fields.items() if not (chosen and name in inferred)}


def _check_complete(fields: Mapping[str, Any], source: str) -> None:
    """Raise if too many tensors are missing to infer a field, because its default would be a guess."""
    needed = ("embed_dim", "depths", "focal_levels", "focal_windows", "num_channels", "mlp_ratio")
    if untold := [name for name in needed if not fields.get(name)]:
        raise ValueError(
            f"{source}: no tensor tells {', '.join(untold)}, since too many are missing; use a complete file, or pass "
            f"{' and '.join(f'{name}=' for name in untold)}"
        )


def _check_settled(fields: Mapping[str, Any], matching: list[str], format: str, source: str) -> None:
    """Raise if a field is determined neither by the file, nor by an argument, nor by a variant."""
    open_fields = {name: why for name, why in UNSETTLED_BY_SHAPES.items() if name not in fields}
    if not open_fields:
        return
    if len(matching) == 1:
        cause = f"published sources of {matching[0]} contradict each other in it"
    else:
        structure = {name: fields[name] for name in ("embed_dim", "depths", "focal_levels", "focal_windows")}
        cause = f"no published variant settles it for {', '.join(f'{k}={v}' for k, v in structure.items())}"
    wanted = "; ".join(f"{name}=True or {name}=False ({why})" for name, why in open_fields.items())
    # A classifier's variant is found by its structure. A detection model has other windows, so its variant is not
    # found, and naming it helps.
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

    Missing and unused heads are not checked here; from_pretrained reports them as for every checkpoint.

    Args:
        model_class: the class of the model to fill.
        path: a file or a directory.
        arguments: those of from_pretrained. ``config``, ``variant``, ``use_ema`` and configuration fields are used
            here. With ``ignore_mismatched_sizes`` the fields may contradict the file, as in transformers.

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

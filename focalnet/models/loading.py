"""Loads a checkpoint of any known format as a model, and converts checkpoints between formats."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import IN_DIRECTORY, SUFFIXES, parts_of, read_json, write_tensors
from ..checkpoints.foreign import check_architecture
from ..checkpoints.key_maps import rename
from ..checkpoints.reading import Checkpoint, check_arguments, comparable, read_checkpoint, told_fields
from ..checkpoints.recognition import FORMATS, KINDS, bare_name, naming_of
from ..checkpoints.structure import DROPPING_FORMATS, UNSETTLED_BY_SHAPES
from ..configuration import FocalNetConfig
from ..pretrained import shipped
from .modeling import (
    FocalNetBackbone,
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    FocalNetModel,
    FocalNetPreTrainedModel,
)
from .patch_embeddings import as_pair

logger = logging.getLogger(__name__)

_CLASSES = {
    model.__name__: model
    for model in (FocalNetBackbone, FocalNetForImageClassification, FocalNetForMaskedImageModeling, FocalNetModel)
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Fields that change the model's results and may be missing from files that are not in transformers' format.
_RESULT_FIELDS = (
    "normalize_modulator",
    "use_post_layernorm",
    "use_conv_embed",
    "stem_padding",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "drop_incomplete_patches",
)
# Names of the classifier's weight in formats that do not call it "classifier.weight".
_HEADS = {"authors": "head.weight", "timm": "head.fc.weight"}


def load_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    variant: str | None = None,
    use_ema: bool | None = None,
    **config_fields: Any,
) -> FocalNetPreTrainedModel:
    """Load a checkpoint as a model of the class that fits it, in evaluation mode.

    Supported are transformers' directories and hub ids, the authors' .pth files (classifiers and detection backbones)
    and timm's state dicts, as safetensors or pickles. Loading a pickle never runs code. Objects that a training script
    stored beside the weights are not constructed.

    The format is recognised by the names of the tensors, and the configuration is inferred from their shapes. Fields
    that the shapes do not determine come from ``config_fields``, else from ``variant``, else from the only published
    variant with this structure. Activation, epsilon and image size are not recorded either. Without an argument or a
    variant they have their defaults. Choices that matter to a user (averaged weights, the padding of a detector's
    stem, dropped parts) are logged as warnings.

    Files of timm and of the authors' classifiers set ``drop_incomplete_patches``, because those models drop incomplete
    patches. With 1000 or 21,842 outputs they also get the class names of ImageNet-1K or ImageNet-22K.

    A file with a head loads as FocalNetForImageClassification or FocalNetForMaskedImageModeling, a file without one as
    FocalNetModel. A detection backbone of the authors loads as FocalNetBackbone, with the maps before downsampling and
    their norms.

    Args:
        path_or_id: a file, a directory written by save_pretrained, an id on the Hugging Face hub, or "digits", the
            small model included in the package. An existing path takes precedence over an id.
        variant: name of a published variant, such as "large_fl4".
        use_ema: which weights to load from a training script's file that holds both the weights and their average over
            training. True loads the average, False the plain weights, None the average if there is one (as timm does).
        config_fields: arguments of FocalNetConfig, such as ``normalize_modulator=True``, or ``stem_padding=3`` for a
            detector of the authors' mmdet code with the overlapping stem.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the file is damaged, refused or not a FocalNet; its tensors do not match its configuration (all
            mismatches are listed); it contradicts the arguments; or the configuration stays ambiguous. A head of
            another size is an error too: use from_pretrained to replace a head.
        TypeError: an argument is not a field of the configuration.
        OSError: the file does not exist (FileNotFoundError), or the hub cannot be reached.
    """
    checkpoint = _read(path_or_id, variant, use_ema, config_fields)
    checkpoint.tell()
    model = _model_class(checkpoint).from_pretrained(
        None, config=checkpoint.config, state_dict=checkpoint.state_dict, **_model_arguments(checkpoint)
    )
    model.config.name_or_path = str(path_or_id)
    return model


@dataclass(frozen=True)
class Conversion:
    """The result of `convert_checkpoint`.

    Attributes:
        source: path or id that the checkpoint was read from.
        path: the file or directory that was written.
        source_format: format of the source: "transformers", "authors", "authors-detection" or "timm".
        format: format of the written file or directory.
        kind: kind of model: "classifier", "masked-image-modeling", "backbone" or "base".
        tensors: number of tensors.
        parameters: number of values in all tensors.
        config: the model's configuration.
        pass_when_reading: settings that the written file does not record. Pass them to `load_checkpoint` with it.
        notes: choices made while reading the source, and differences in the results of the format's own library.
    """

    source: str
    path: Path
    source_format: str
    format: str
    kind: str
    tensors: int
    parameters: int
    config: FocalNetConfig
    pass_when_reading: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = "transformers",
    *,
    variant: str | None = None,
    use_ema: bool | None = None,
    **config_fields: Any,
) -> Conversion:
    """Convert a checkpoint from any known format to another. No value changes: a round trip is bit-exact.

    ``src``, ``variant``, ``use_ema`` and ``config_fields`` are those of `load_checkpoint`.

    Args:
        dst: path to write to; an existing file is replaced. "transformers" needs a directory, which receives
            config.json and model.safetensors. The other formats need a file ending in .safetensors, or in .pth, .pt or
            .bin for torch.save. The authors' formats hold the tensors under the key "model".
        format: "transformers", "authors", "authors-detection" or "timm".

    Returns:
        A `Conversion`. Its ``pass_when_reading`` lists settings that only transformers' format records.

    Raises:
        ValueError: ``format`` or the suffix of ``dst`` is unknown, or the format cannot hold this model. Reading the
            source raises the errors of `load_checkpoint`.
    """
    dst = Path(dst)
    _check_destination(dst, format)
    checkpoint = _read(src, variant, use_ema, config_fields)
    if reason := _why_not(checkpoint, format):
        raise ValueError(f"format: {format!r} cannot hold this {checkpoint.kind} from {checkpoint.source}: {reason}")
    if format == "transformers":
        _write_directory(checkpoint, dst)
        open_fields = {}
    else:
        tensors = _renamed(checkpoint, format)
        write_tensors(dst, tensors, wrapper=None if format == "timm" else "model")
        open_fields = _not_told(checkpoint, tensors)
    notes = checkpoint.notes + _differences(checkpoint.config, format)
    for note in notes:
        logger.warning("%s: %s", src, note)
    if open_fields:
        logger.warning("%s does not record %s: pass these to load_checkpoint when reading it", dst, open_fields)
    return Conversion(
        source=str(src),
        path=dst,
        source_format=checkpoint.format,
        format=format,
        kind=checkpoint.kind,
        tensors=len(checkpoint.state_dict),
        parameters=sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
        config=checkpoint.config,
        pass_when_reading=open_fields,
        notes=notes,
    )


def _read(
    path_or_id: str | os.PathLike[str], variant: str | None, use_ema: bool | None, config_fields: dict[str, Any]
) -> Checkpoint:
    """Read a checkpoint from a path, the package or the hub, and check that its tensors fit the model's class."""
    check_arguments(variant, config_fields)
    path = Path(path_or_id).expanduser()
    if not str(path_or_id) or not path.exists():  # "" is a path to the current directory
        path = shipped(str(path_or_id)) or _download(str(path_or_id))
    checkpoint = read_checkpoint(path, variant=variant, use_ema=use_ema, **config_fields)
    _check_head(checkpoint, config_fields)
    with torch.device("meta"):
        model = _model_class(checkpoint)(checkpoint.config, **_model_arguments(checkpoint))
    checkpoint.verify(model.state_dict())
    return checkpoint


def _check_head(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> None:
    """Raise if the requested number of labels differs from the file's: load_checkpoint never replaces a head."""
    given = [name for name in ("num_labels", "id2label") if name in config_fields]
    weight = checkpoint.state_dict.get("classifier.weight")
    wanted = checkpoint.config.num_labels
    if not given or (weight is not None and weight.ndim == 2 and len(weight) == wanted):
        return
    has = "the file has no head"
    if weight is not None:
        name = _HEADS.get(checkpoint.format, "classifier.weight")
        has = f"{name} is {tuple(weight.shape)}, expected {(wanted, *weight.shape[1:])}"
    settings = "".join(f", {name}={value!r}" for name, value in config_fields.items() if name not in given)
    raise ValueError(
        f"{checkpoint.source}: {given[0]}: {wanted} labels were requested, but {has}. load_checkpoint does not "
        f"replace heads: omit {given[0]}; for a new head to be trained use FocalNetForImageClassification."
        f"from_pretrained({checkpoint.source!r}, num_labels={wanted}, ignore_mismatched_sizes=True{settings})"
    )


def _differences(config: FocalNetConfig, format: str) -> tuple[str, ...]:
    """Notes on results that differ between this model and the models of ``format`` with the same weights."""
    drops = bool(config.drop_incomplete_patches)
    if drops == (format in DROPPING_FORMATS):
        return ()
    does = "fill incomplete patches with zeros" if drops else "drop incomplete patches"
    kept = "; config.json keeps drop_incomplete_patches for focalnet" if format == "transformers" else ""
    return (
        f"models of the format {format} {does}, this one does not: results differ for images that are not a whole "
        f"number of patches in every stage{kept}",
    )


def _model_class(checkpoint: Checkpoint) -> type[FocalNetPreTrainedModel]:
    return _CLASSES[KINDS[checkpoint.kind]]


def _model_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    has_mask_token = "embeddings.mask_token" in checkpoint.state_dict
    return {"use_mask_token": True} if checkpoint.kind == "base" and has_mask_token else {}


def _download(name: str) -> Path:
    """The directory in the hub's cache with the configuration and weights of ``name``."""
    if not _HUB_ID.fullmatch(name) or name.endswith((*SUFFIXES, ".json")):
        raise FileNotFoundError(
            f"path_or_id: expected a file, a directory, or an id on the Hugging Face hub such as "
            f"microsoft/focalnet-tiny, got {name!r}, which does not exist; check the path"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        configuration = Path(hf_hub_download(name, "config.json"))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise OSError(
            f"path_or_id: {name!r} is no file or directory here, and its config.json is not in the cache of the "
            f"Hugging Face hub and could not be downloaded ({type(error).__name__}); check the spelling and the "
            f"connection, or pass the path of a downloaded checkpoint"
        ) from None
    check_architecture(name, read_json(configuration))
    for weights in IN_DIRECTORY:
        try:
            found = Path(hf_hub_download(name, weights))
            for part in parts_of(found):
                hf_hub_download(name, part.name)
        except (OSError, EntryNotFoundError):
            continue
        return configuration.parent
    raise OSError(
        f"path_or_id: none of {', '.join(IN_DIRECTORY)} of {name!r} is in the cache of the Hugging Face hub or could "
        f"be downloaded; check the connection, or pass the path of a downloaded checkpoint"
    )


def _check_destination(dst: Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if format == "transformers":
        if dst.is_file() or dst.suffix in SUFFIXES:
            raise ValueError(f"dst: expected a directory for format 'transformers', got the file {str(dst)!r}")
    elif dst.is_dir() or dst.suffix not in SUFFIXES:
        raise ValueError(f"dst: expected a file ending in {', '.join(SUFFIXES)} for {format!r}, got {str(dst)!r}")


def _why_not(checkpoint: Checkpoint, format: str) -> str | None:
    """Why ``format`` cannot hold the checkpoint, or None if it can."""
    if format == "transformers":
        return None
    config = checkpoint.config
    _, without_place = rename(_bare(checkpoint), "transformers", naming_of(format))
    if without_place:
        return f"it has no place for {', '.join(sorted(without_place))}"
    if format == "authors-detection":
        if checkpoint.kind != "backbone" or not config.use_feature_map_norms:
            return "it is for backbones with a norm for each map (use_feature_map_norms)"
        if not config.feature_maps_before_downsampling:
            return "its maps are taken before downsampling (feature_maps_before_downsampling)"
        return None
    if checkpoint.kind not in ("classifier", "base"):
        return "it is for classifiers and models without a head"
    if format == "timm" and not config.use_conv_embed and as_pair(config.patch_size) != (4, 4):
        return f"timm's FocalNet has patches of 4, this model has {config.patch_size}"
    if config.stem_padding not in (None, 2):
        return f"its stem has padding 2, this model has stem_padding={config.stem_padding}"
    return None


def _bare(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {bare_name(name): tensor for name, tensor in checkpoint.state_dict.items()}


def _renamed(checkpoint: Checkpoint, format: str) -> dict[str, Tensor]:
    post_norm = checkpoint.config.use_post_layernorm
    return rename(_bare(checkpoint), "transformers", naming_of(format), post_norm)[0]


def _not_told(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of the checkpoint that cannot be inferred from ``tensors``, or would be inferred wrongly."""
    usual = {name: getattr(FocalNetConfig(), name) for name in _RESULT_FIELDS if name not in UNSETTLED_BY_SHAPES}
    told = {**usual, **told_fields(tensors, checkpoint.source)}
    settings = {name: getattr(checkpoint.config, name) for name in _RESULT_FIELDS}
    return {
        name: value if name != "drop_incomplete_patches" else bool(value)
        for name, value in settings.items()
        if name not in told or comparable(name, told[name]) != comparable(name, value)
    }


def _write_directory(checkpoint: Checkpoint, directory: Path) -> None:
    # A file may hold several dtypes. A model has one, so a model's save_pretrained would change some tensors.
    config = FocalNetConfig.from_dict(checkpoint.config.to_dict())
    config.architectures = [KINDS[checkpoint.kind]]
    config.dtype = next((t.dtype for t in checkpoint.state_dict.values() if t.is_floating_point()), None)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", checkpoint.state_dict)
    config.save_pretrained(directory)

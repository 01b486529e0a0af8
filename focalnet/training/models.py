"""Makes the model that a run starts from: a new variant, or a checkpoint of any format with a suitable head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.imagenet import class_ids, class_names
from ..configuration import FocalNetConfig
from ..models.loading import load_checkpoint
from ..models.modeling import (
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    FocalNetPreTrainedModel,
)
from ..variants import VARIANTS
from .settings import Settings


@dataclass(frozen=True)
class Start:
    """The source of the weights: ``model`` as given to --model, or None for a new model with ``config``'s fields."""

    model: str | None = None
    variant: str | None = None
    config: dict[str, Any] | None = None
    use_ema: bool | None = None

    @property
    def is_new(self) -> bool:
        return self.model is None or self.model in VARIANTS

    def new_config(self, **fields: Any) -> FocalNetConfig:
        given = {**(self.config or {}), **fields}
        return FocalNetConfig(**given) if self.model is None else FocalNetConfig.from_variant(self.model, **given)

    def load(self) -> FocalNetPreTrainedModel:
        """Load the checkpoint. Raises as `load_checkpoint`, and ValueError unless it has three input channels."""
        loaded = load_checkpoint(self.model, variant=self.variant, use_ema=self.use_ema, **(self.config or {}))
        if loaded.config.num_channels != 3:
            raise ValueError(
                f"expected a model of colour images, with num_channels 3, this one has {loaded.config.num_channels}"
            )
        return loaded


def classifier(
    start: Start, labels: list[str], settings: Settings, keep_head: bool = False
) -> tuple[FocalNetForImageClassification, list[int], str]:
    """Make a classifier of ``labels``.

    Where a checkpoint's head knows a label, by name or by WordNet id, the row of that label is kept. A 22K model thus
    keeps the thousand rows of ImageNet-1K. With ``keep_head`` the head stays unchanged.

    Returns:
        The model, the index of each label among its outputs, and a description of the head for the user.

    Raises:
        ValueError: ``keep_head`` is set, but there is no head, or it lacks some of the labels.
    """
    if start.is_new:
        if keep_head:
            raise ValueError("--keep-head: a model from scratch has no head to keep; leave it out")
        config = start.new_config(**_label_fields(labels), **_model_fields(settings))
        return FocalNetForImageClassification(config), list(range(len(labels))), "new"
    loaded = start.load()
    known = _known(loaded, labels)
    if keep_head:
        return _with_its_head(loaded, labels, known, settings), [known[index] for index in range(len(labels))], "kept"
    model = FocalNetForImageClassification(_config_of(loaded, **_label_fields(labels), **_model_fields(settings)))
    _take_over(model, loaded)
    with torch.no_grad():
        for place, row in known.items():
            model.classifier.weight[place] = loaded.classifier.weight[row]
            model.classifier.bias[place] = loaded.classifier.bias[row]
    head = f"{len(known)} of {len(labels)} outputs kept, by their labels" if known else "new"
    return model, list(range(len(labels))), head


def masked_model(start: Start, settings: Settings) -> FocalNetForMaskedImageModeling:
    """A model that reconstructs masked patches, from scratch or around the weights of a checkpoint."""
    if start.is_new:
        config = start.new_config(**_model_fields(settings))
        config.encoder_stride = _stride(config)
        return FocalNetForMaskedImageModeling(config)
    loaded = start.load()
    config = _config_of(loaded, **_model_fields(settings))
    config.encoder_stride = _stride(config)
    model = FocalNetForMaskedImageModeling(config)
    if isinstance(loaded, FocalNetForMaskedImageModeling):
        model.load_state_dict(loaded.state_dict())
    else:
        _take_over(model, loaded)
    return model


def recompute_blocks(model: FocalNetPreTrainedModel) -> None:
    """Turn on gradient checkpointing of blocks, in every supported version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _stride(config: FocalNetConfig) -> int:
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return (4 if config.use_conv_embed else patch) * 2 ** (len(config.depths) - 1)


def _model_fields(settings: Settings) -> dict[str, Any]:
    return {"image_size": settings.image_size, "drop_path_rate": settings.drop_path}


def _label_fields(labels: list[str]) -> dict[str, Any]:
    names = class_names(len(labels)) if labels == class_ids(len(labels)) else labels
    id2label = dict(enumerate(names))
    return {
        "num_labels": len(names),
        "id2label": id2label,
        "label2id": {name: index for index, name in id2label.items()},
    }


def _config_of(loaded: FocalNetPreTrainedModel, **fields: Any) -> FocalNetConfig:
    kept = loaded.config.to_dict()
    for name in ("num_labels", "id2label", "label2id", "problem_type", "architectures", "dtype", "torch_dtype"):
        kept.pop(name, None)
    # Fields of detection backbones, which models with a head do not have.
    for name in ("out_features", "out_indices", "feature_maps_before_downsampling", "use_feature_map_norms"):
        kept.pop(name, None)
    return FocalNetConfig.from_dict({**kept, **fields})


def _take_over(model: FocalNetPreTrainedModel, loaded: FocalNetPreTrainedModel) -> None:
    """Copy the network's weights without the head. A final LayerNorm or mask token that ``loaded`` lacks stays new."""
    base = getattr(loaded, "focalnet", loaded)
    tensors = base.state_dict()
    if model.focalnet.embeddings.mask_token is None:
        tensors.pop("embeddings.mask_token", None)
    missing, unexpected = model.focalnet.load_state_dict(tensors, strict=False)
    lacking = [name for name in missing if name.split(".")[0] != "layernorm" and not name.endswith("mask_token")]
    if lacking or unexpected:
        raise ValueError(f"expected the tensors of a FocalNet; without {lacking[:3]}, with {list(unexpected)[:3]}")


def _known(loaded: FocalNetPreTrainedModel, labels: list[str]) -> dict[int, int]:
    """Maps the index of each label that the head knows, by name or WordNet id, to the index of its output."""
    if not isinstance(loaded, FocalNetForImageClassification) or loaded.config.num_labels < 1:
        return {}
    outputs = {name: index for index, name in loaded.config.id2label.items() if not name.startswith("LABEL_")}
    ids = class_ids(loaded.config.num_labels) or []
    outputs.update({wordnet_id: index for index, wordnet_id in enumerate(ids)})
    return {place: outputs[label] for place, label in enumerate(labels) if label in outputs}


def _with_its_head(
    loaded: FocalNetPreTrainedModel, labels: list[str], known: dict[int, int], settings: Settings
) -> FocalNetForImageClassification:
    unknown = [label for place, label in enumerate(labels) if place not in known]
    if unknown:
        raise ValueError(
            f"--keep-head: the model's head does not know {len(unknown)} of the {len(labels)} labels: "
            f"{', '.join(map(repr, unknown[:5]))}; without --keep-head these get new outputs"
        )
    fields = {name: getattr(loaded.config, name) for name in ("id2label", "label2id")}
    model = FocalNetForImageClassification(_config_of(loaded, **fields, **_model_fields(settings)))
    model.load_state_dict(loaded.state_dict())
    return model

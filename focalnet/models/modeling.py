"""The FocalNet models, drop-in for transformers': the same names, parameters, arguments and outputs.

Yang et al., "Focal Modulation Networks", NeurIPS 2022 (arXiv:2203.11926). docs/differences.md lists the additions to
transformers' models and the differences from them. One file, as the classes are in transformers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import ModelOutput

from ..backends.registry import requested
from ..checkpoints.foreign import is_foreign
from ..checkpoints.reading import pretrained_arguments
from ..configuration import FocalNetConfig
from ..fusion import cpu_head
from ..fusion.cpu_inference import Precision, is_rounding, why_not_call
from ..fusion.gate import while_unchanged
from ..fusion.module_checks import all_are_watched, is_changed, is_mean
from .layers import (
    FocalNetEmbeddings,
    FocalNetEncoder,
    FocalNetLayer,
    StemCall,
    calls_of,
    run_stages,
    stages_of,
    stem_call,
)
from .padding import cut_to


@dataclass
class FocalNetModelOutput(ModelOutput):
    """The output of FocalNetModel.

    Attributes:
        last_hidden_state: (B, N, C), tokens of the last stage after the final LayerNorm.
        pooler_output: (B, C), the mean of those tokens; None without a pooling layer.
        hidden_states: tokens (B, N_i, C_i) of the stem and of every stage after its downsampling, if requested.
        reshaped_hidden_states: the hidden states as maps (B, C_i, H_i, W_i).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class FocalNetMaskedImageModelingOutput(ModelOutput):
    """The output of FocalNetForMaskedImageModeling.

    Attributes:
        loss: scalar, mean absolute error over masked pixels; None without ``bool_masked_pos``.
        reconstruction: (B, num_channels, H, W), reconstructed pixel values; ``logits`` is another name for it.
        hidden_states: as in FocalNetModelOutput.
        reshaped_hidden_states: as in FocalNetModelOutput.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor | None:
        """The reconstruction, under the name used in published examples."""
        return self.reconstruction


@dataclass
class FocalNetImageClassifierOutput(ModelOutput):
    """The output of FocalNetForImageClassification.

    Attributes:
        loss: scalar; None without ``labels``.
        logits: (B, num_labels), scores before softmax, or the values of a regression.
        hidden_states: as in FocalNetModelOutput.
        reshaped_hidden_states: as in FocalNetModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


class FocalNetPreTrainedModel(PreTrainedModel):
    """Base class of all models: initialises, loads and saves weights, as every model of transformers does."""

    config: FocalNetConfig
    config_class = FocalNetConfig
    base_model_prefix = "focalnet"
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["FocalNetStage"]  # noqa: RUF012  (read by accelerate as a list)

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        config.validate_fields()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> FocalNetPreTrainedModel:
        """Load a model as in transformers, or from a single file in any format that `focalnet.load_checkpoint` reads.

        For a file or a directory of timm, ``variant`` names the published variant, ``use_ema`` chooses between the
        averaged and the plain weights of a training script, and configuration fields set what the shapes do not
        determine. A missing or unused head is reported as for every checkpoint.

        Returns:
            The model, or with ``output_loading_info=True`` the model and the loading information.

        Raises:
            ValueError: the file does not fit, or the directory holds a model of another architecture.
        """
        path = pretrained_model_name_or_path
        if path is None or not is_foreign(Path(path).expanduser(), kwargs.get("config") or kwargs.get("subfolder")):
            return super().from_pretrained(path, *model_args, **kwargs)
        arguments = pretrained_arguments(cls, Path(path).expanduser(), kwargs)
        loaded = super().from_pretrained(None, *model_args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.name_or_path = model.config.name_or_path = str(path)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FocalNetEmbeddings) and module.mask_token is not None:
            init.zeros_(module.mask_token)
        elif isinstance(module, FocalNetLayer):
            for gamma in (module.gamma_1, module.gamma_2):
                if gamma is not None:
                    init.constant_(gamma, self.config.layerscale_value)


class FocalNetModel(FocalNetPreTrainedModel):
    """The network without a head: stem, stages, a final LayerNorm and the mean over positions.

    Args:
        config: the configuration.
        add_pooling_layer: whether to compute ``pooler_output``.
        use_mask_token: whether to learn a token that replaces masked patches.
    """

    def __init__(self, config: FocalNetConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.num_stages = len(config.depths)
        self.num_features = config.stage_dims[-1]
        self.embeddings = FocalNetEmbeddings(config, use_mask_token)
        self.encoder = FocalNetEncoder(config)
        self.layernorm: nn.Module = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
        self.post_init()

    @property
    def add_pooling_layer(self) -> bool:
        return self.pooler is not None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple[Any, ...] | FocalNetModelOutput:
        """Tokens of the last stage, and their mean if the model has a pooling layer.

        Args:
            pixel_values: images, ``(B, num_channels, H, W)``, floating point, any H and W.
            bool_masked_pos: ``(B, N)``, true where a patch of the stem's ``h x w = N`` grid is masked.
            output_hidden_states: return the tokens of every stage. None means ``config.output_hidden_states``.
            return_dict: return a FocalNetModelOutput instead of a tuple. None means ``config.return_dict``.

        Raises:
            ValueError, TypeError: the images or the mask are invalid; the message names the argument.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collect = bool(output_hidden_states)
        images: Any = pixel_values  # None is refused by the embeddings
        found = why_not_call(images) or _calls(self, is_rounding(), requested(None))
        if isinstance(found, str):
            last, maps = self.encoder(self.embeddings(pixel_values, bool_masked_pos), collect=collect)
            last = self.layernorm(last).flatten(1, 2)
            pooled = self._pooled(last)
        else:
            stem, stages, norm_mean = found
            embeddings = self.embeddings.by_operator(images, bool_masked_pos, StemCall(*stem))
            last, maps = run_stages(stages_of(stages), embeddings, collect)
            last, pooled = cpu_head.run(last, norm_mean)
        output = FocalNetModelOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=tuple(tokens for tokens, _ in maps) if maps else None,
            reshaped_hidden_states=tuple(reshaped for _, reshaped in maps) if maps else None,
        )
        if _wants_dict(self.config, return_dict):
            return output
        # transformers returns None for a missing pooler_output, so that hidden states are always third.
        rest = (output.hidden_states, output.reshaped_hidden_states) if maps else ()
        return (output.last_hidden_state, output.pooler_output, *rest)

    def _pooled(self, tokens: Tensor) -> Tensor | None:
        """(B, N, C) -> (B, C); None without pooling layer."""
        if self.pooler is None:
            return None
        if is_mean(self.pooler) and not all_are_watched():
            return tokens.mean(1)  # one kernel less
        return self.pooler(tokens.transpose(1, 2)).flatten(1)


@while_unchanged
def _calls(model: FocalNetModel, rounded: bool, around: str | None) -> list[Any] | str:
    """The calls of operators that compute the model: stem, stages, and norm with mean. Or the reason why not.

    Asked once, so that a forward looks at its modules in one go. Models without pooling ask part by part.
    """
    stem, encoder = model._modules["embeddings"], model._modules["encoder"]
    if type(stem) is not FocalNetEmbeddings or type(encoder) is not FocalNetEncoder:
        return "the embeddings or the encoder were replaced"
    if is_changed(stem) or is_changed(encoder):
        return "the embeddings or the encoder were wrapped or hooked"
    projection = stem.patch_embeddings._modules.get("projection")
    weight = None if projection is None else projection._parameters.get("weight")
    if weight is None:
        return "the stem has no weight"
    precision = Precision(torch.bfloat16 if rounded else weight.dtype, rounded)
    found = [
        stem_call(stem, precision, around),
        calls_of(encoder, precision, around),
        cpu_head.norm_mean(model.layernorm, model.pooler, precision, around),
    ]
    return next((reason for reason in found if isinstance(reason, str)), found)


class FocalNetForMaskedImageModeling(FocalNetPreTrainedModel):
    """FocalNet with a decoder that reconstructs masked patches, as in SimMIM (Xie et al., arXiv:2111.09886).

    Images may have any height and width. The mask has one value for each patch of the stem's grid.
    """

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        self.focalnet = FocalNetModel(config, add_pooling_layer=False, use_mask_token=True)
        out_channels = config.encoder_stride**2 * config.num_channels
        self.decoder = nn.Sequential(
            nn.Conv2d(self.focalnet.num_features, out_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple[Any, ...] | FocalNetMaskedImageModelingOutput:
        """The reconstruction, and with ``bool_masked_pos`` the loss. Arguments and errors: `FocalNetModel.forward`.

        Examples:
            >>> height, width = (size // config.patch_size for size in pixel_values.shape[-2:])
            >>> bool_masked_pos = torch.rand(len(pixel_values), height * width) < 0.6
            >>> loss = model(pixel_values, bool_masked_pos=bool_masked_pos).loss
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # The maps are needed for the height and width of their grids, which tokens do not have.
        outputs = self.focalnet(pixel_values, bool_masked_pos, output_hidden_states=True, return_dict=True)
        images: Any = pixel_values  # the embeddings refuse None
        stem, *_, last = outputs.reshaped_hidden_states
        tokens = outputs.last_hidden_state.transpose(1, 2).view(last.shape)
        # The stem and the downsamplings pad at the bottom and the right, so the reconstruction can exceed the image.
        reconstruction = self.decoder(tokens)
        if not self.config.drop_incomplete_patches:
            reconstruction = cut_to(reconstruction, images.shape[-2:])
        loss = None
        if bool_masked_pos is not None:
            loss = self._masked_loss(images, reconstruction, bool_masked_pos.view(-1, *stem.shape[2:]))
        output = FocalNetMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            reshaped_hidden_states=outputs.reshaped_hidden_states if output_hidden_states else None,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _masked_loss(self, pixel_values: Tensor, reconstruction: Tensor, mask: Tensor) -> Tensor:
        """Mean absolute error over the pixels of masked patches; ``mask`` (B, h, w)."""
        if reconstruction.shape != pixel_values.shape and self.config.drop_incomplete_patches:
            raise ValueError(
                f"pixel_values: expected a height and a width of whole patches in every stage because "
                f"config.drop_incomplete_patches is set, got {tuple(pixel_values.shape[-2:])}; the reconstruction "
                f"covers only {tuple(reconstruction.shape[-2:])}. Resize the images or unset the field"
            )
        if reconstruction.shape != pixel_values.shape:
            raise ValueError(
                f"encoder_stride: expected the network's stride, so that the reconstruction covers the image of "
                f"{tuple(pixel_values.shape[-2:])}, got {self.config.encoder_stride}, which makes the reconstruction "
                f"{tuple(reconstruction.shape[-2:])}"
            )
        # Use the stem's stride: with overlapping patches it is always 4, even if config.patch_size differs.
        patch_height, patch_width = self.focalnet.embeddings.patch_embeddings.projection.stride
        mask = mask.repeat_interleave(patch_height, 1).repeat_interleave(patch_width, 2)[:, None]
        mask = cut_to(mask, pixel_values.shape[-2:])
        error = nn.functional.l1_loss(reconstruction, pixel_values.to(reconstruction.dtype), reduction="none")
        return (error * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels


class FocalNetForImageClassification(FocalNetPreTrainedModel):
    """FocalNet with a linear classifier on the mean of the last stage's tokens, for example for ImageNet."""

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.focalnet = FocalNetModel(config)
        features = self.focalnet.num_features
        self.classifier = nn.Linear(features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple[Any, ...] | FocalNetImageClassifierOutput:
        """Logits, and with ``labels`` the loss. The other arguments are those of `FocalNetModel.forward`.

        Args:
            labels: ``(B,)`` class indices, ``(B, num_labels)`` floats for multi-label classification, or regression
                targets. ``config.problem_type`` selects one. None selects regression if num_labels is 1, else
                classification for integer labels and multi-label classification for floats.

        Raises:
            ValueError: a class index is outside ``[0, num_labels)`` (checked for labels on the CPU).
        """
        outputs = self.focalnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self._classified(outputs.pooler_output)
        loss = None
        if labels is not None:
            self._check_labels(labels)
            loss = self.loss_function(labels, logits, self.config)
        output = FocalNetImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _classified(self, features: Tensor) -> Tensor:
        found = why_not_call(features) or cpu_head.linear(self.classifier, Precision.of(features), requested(None))
        return self.classifier(features) if isinstance(found, str) else cpu_head.run(features, found)

    def _check_labels(self, labels: Tensor) -> None:
        are_classes = self.num_labels > 1 and not labels.is_floating_point()
        # Reading values from a GPU would synchronise with it; its loss kernel asserts the range. A graph cannot read
        # values at all.
        if torch.compiler.is_compiling() or labels.device.type != "cpu" or not are_classes:
            return
        if self.config.problem_type not in (None, "single_label_classification"):
            return
        outside = labels[(labels != -100) & ((labels < 0) | (labels >= self.num_labels))]
        if outside.numel():
            raise ValueError(
                f"labels: expected class indices from 0 to {self.num_labels - 1} (config.num_labels is "
                f"{self.num_labels}), or -100 to ignore one, got {outside[0].item()}"
            )


class FocalNetBackbone(BackboneMixin, FocalNetPreTrainedModel):
    """FocalNet as a backbone: returns the maps of the stages in ``config.out_features`` or ``config.out_indices``.

    By default a stage's map is taken after its downsampling, as in transformers: strides 8, 16, 32, 32. With
    ``config.feature_maps_before_downsampling`` it is taken before: strides 4, 8, 16, 32, as dense prediction needs.
    ``channels`` holds the number of channels of each returned map.

    Parameters that do not contribute to a map (the final LayerNorm, stages after the last map) have
    ``requires_grad=False``, so that DistributedDataParallel does not wait for their gradients. They stay in the state
    dict. If hidden states are requested, all stages get gradients. DistributedDataParallel reads ``requires_grad``
    only once, so set ``config.output_hidden_states`` before wrapping the model.
    """

    has_attentions = False

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        dims = config.stage_dims
        stages = dims if config.feature_maps_before_downsampling else [*dims[1:], dims[-1]]
        self.num_features = [config.embed_dim, *stages]
        self.focalnet = FocalNetModel(config)
        if config.use_feature_map_norms:
            # Each map has its own norm here, and the published checkpoints have no final norm.
            self.focalnet.layernorm = nn.Identity()
            self.hidden_states_norms = nn.ModuleDict(
                {
                    stage: nn.LayerNorm(self.out_feature_channels[stage], eps=config.layer_norm_eps)
                    for stage in self.out_features
                }
            )
        self._frozen: tuple[str, ...] = ()
        self.post_init()
        self._freeze_what_no_map_comes_from()

    def get_input_embeddings(self) -> nn.Module:
        return self.focalnet.get_input_embeddings()

    def train(self, mode: bool = True) -> FocalNetBackbone:
        # from_pretrained (also of a model that contains this one) replaces all parameters and then calls eval.
        self._freeze_what_no_map_comes_from()
        return super().train(mode)

    def _freeze_what_no_map_comes_from(self) -> None:
        unused = ("focalnet.layernorm", *self._parts_behind_the_maps())
        parts = {name: part for name, part in self.named_modules() if name in (*unused, *self._frozen)}
        for name, part in parts.items():
            # Unfreeze parts that contribute to a map since the configuration was changed.
            part.requires_grad_(name not in unused)
        self._frozen = unused

    def _let_all_stages_train(self) -> None:
        """Unfreeze all stages, because requested hidden states depend on them. A frozen backbone stays frozen."""
        behind_the_maps = self._frozen[1:]
        if behind_the_maps and any(parameter.requires_grad for parameter in self.parameters()):
            for name in behind_the_maps:
                self.get_submodule(name).requires_grad_(True)
            self._frozen = self._frozen[:1]

    def _parts_behind_the_maps(self) -> list[str]:
        """Names of the stages, and of the downsampling, that no returned map or hidden state depends on."""
        if self.config.output_hidden_states:
            return []
        last = max(self.stage_names.index(stage) for stage in self.out_features)  # 0 is the stem
        stages = self.focalnet.encoder.stages
        names = [f"focalnet.encoder.stages.{index}" for index in range(last, len(stages))]
        if self.config.feature_maps_before_downsampling and 0 < last < len(stages):
            names.append(f"focalnet.encoder.stages.{last - 1}.downsample")
        return names

    def forward(  # type: ignore[override]  # the mixin names output_attentions, which **kwargs takes
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple[Any, ...] | BackboneOutput:
        """``pixel_values`` (B, num_channels, H, W) -> ``feature_maps``, one (B, C_i, H_i, W_i) for each out_feature.

        ``output_hidden_states`` may also be an index or a list of indices. Hidden states at other indices are then
        None. Errors are those of `FocalNetModel.forward`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states and torch.is_grad_enabled():
            self._let_all_stages_train()
        embeddings = self.focalnet.embeddings(pixel_values)
        before = self.config.feature_maps_before_downsampling
        _, maps = self.focalnet.encoder(embeddings, collect=True, before_downsampling=before)
        feature_maps: Any = tuple(
            self._feature_map(stage, reshaped)
            for stage, (_, reshaped) in zip(self.stage_names, maps, strict=True)
            if stage in self.out_features
        )
        output = BackboneOutput(
            feature_maps=feature_maps,
            hidden_states=_selected(tuple(tokens for tokens, _ in maps), output_hidden_states),
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _feature_map(self, stage: str, reshaped: Tensor) -> Tensor:
        if not self.config.use_feature_map_norms:
            return reshaped
        return self.hidden_states_norms[stage](reshaped.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _selected(hidden_states: tuple[Tensor, ...], wanted: bool | int | Sequence[int] | None) -> Any:
    if isinstance(wanted, bool) or not wanted:
        return hidden_states if wanted else None
    count = len(hidden_states)
    indices = [wanted] if isinstance(wanted, int) else wanted
    kept = {index % count for index in indices if -count <= index < count}
    return [tokens if index in kept else None for index, tokens in enumerate(hidden_states)]


def _wants_dict(config: FocalNetConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)

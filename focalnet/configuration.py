"""FocalNetConfig: transformers' FocalNet configuration, field for field, with the published variants by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS, ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .variants import VARIANTS

# transformers documents "selu" for `hidden_act`, but its table of activations lacks it.
_MISSING_FROM_ACT2FN = {"selu": nn.SELU}


def activation(name: str) -> nn.Module:
    """A new module for a ``hidden_act``: any name that transformers knows, or "selu"."""
    return _MISSING_FROM_ACT2FN[name]() if name in _MISSING_FROM_ACT2FN else ACT2FN[name]


class FocalNetConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a FocalNet. It reads and writes the same JSON as transformers' FocalNetConfig.

    The defaults are those of microsoft/focalnet-tiny. A stage's width is ``embed_dim * 2 ** stage``.

    Args:
        image_size (int or pair): height and width of the training images, in pixels. The model accepts any other size.
        patch_size (int or pair): size and stride of a patch in the stem.
        num_channels (int): channels of the input image.
        embed_dim (int): channels of the first stage.
        use_conv_embed (bool): overlapping patches: 7x7 stride 4 in the stem, 3x3 stride 2 between stages.
        hidden_sizes (list of int): kept for compatible JSON and otherwise unused; ``embed_dim`` sets the widths.
        depths (list of int): blocks per stage.
        focal_levels (list of int): focal levels L per stage.
        focal_windows (list of int): kernel size of the first level per stage, odd; level l has ``window + 2 * l``.
        hidden_act (str): activation of the MLP, any of transformers' names, or "selu". The modulation's own activation
            is always the exact GELU.
        mlp_ratio (float): hidden size of the MLP divided by the width of the block.
        hidden_dropout_prob (float): dropout after the embeddings, the modulation and inside the MLP.
        drop_path_rate (float): stochastic depth rate of the last block. Rates grow linearly from 0 at the first block.
        use_layerscale (bool): a learned scale per channel on both branches.
        layerscale_value (float): initial value of that scale.
        use_post_layernorm (bool): LayerNorm after each branch instead of before it.
        use_post_layernorm_in_modulation (bool): LayerNorm inside the modulation, before its last projection.
        normalize_modulator (bool): divide the aggregated context by L + 1.
        initializer_range (float): standard deviation of initial weights.
        layer_norm_eps (float): epsilon of every LayerNorm.
        encoder_stride (int): upsampling factor of the masked-image-modelling decoder.
        out_features (list of str): names of the maps that a FocalNetBackbone returns: "stem", "stage1", ...
        out_indices (list of int): the same maps by index. Give ``out_features`` or ``out_indices``, not both.
        feature_maps_before_downsampling (bool): FocalNetBackbone returns each stage's map before the stage's
            downsampling. Stages 1 to 4 then have strides 4, 8, 16, 32, as dense prediction needs, instead of
            8, 16, 32, 32.
        use_feature_map_norms (bool): FocalNetBackbone applies a LayerNorm to each map that it returns, as the authors'
            detection backbone does.
        stem_padding (int or None): padding of the overlapping stem. None means 2; the authors' mmdet code uses 3.
        drop_incomplete_patches (bool or None): drop the rows at the bottom and the columns at the right that do not
            fill a patch, as timm and the authors' classifiers do. False pads them with zeros, as transformers does.
            None means False, except for weights in the format of a model that drops.

    The last four fields are not in transformers. They are left out of the JSON while they keep their defaults.

    Raises:
        ValueError, TypeError: a field is out of range, or has the wrong type or length; the message names the field.
    """

    model_type = "focalnet"

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        use_conv_embed: bool = False,
        hidden_sizes: Sequence[int] = (192, 384, 768, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        hidden_act: str = "gelu",
        mlp_ratio: float = 4.0,
        hidden_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_post_layernorm: bool = False,
        use_post_layernorm_in_modulation: bool = False,
        normalize_modulator: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        encoder_stride: int = 32,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        feature_maps_before_downsampling: bool = False,
        use_feature_map_norms: bool = False,
        stem_padding: int | None = None,
        drop_incomplete_patches: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.use_conv_embed = use_conv_embed
        self.hidden_sizes = hidden_sizes
        self.depths = depths
        self.focal_levels = focal_levels
        self.focal_windows = focal_windows
        self.hidden_act = hidden_act
        self.mlp_ratio = mlp_ratio
        self.hidden_dropout_prob = hidden_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.use_layerscale = use_layerscale
        self.layerscale_value = layerscale_value
        self.use_post_layernorm = use_post_layernorm
        self.use_post_layernorm_in_modulation = use_post_layernorm_in_modulation
        self.normalize_modulator = normalize_modulator
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.encoder_stride = encoder_stride
        self.feature_maps_before_downsampling = feature_maps_before_downsampling
        self.use_feature_map_norms = use_feature_map_norms
        self.stem_padding = stem_padding
        self.drop_incomplete_patches = drop_incomplete_patches
        self.validate_fields()
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, len(depths) + 1))]
        self._select_outputs(out_features, out_indices)
        super().__init__(**kwargs)

    @classmethod
    def from_variant(cls, variant: str, **fields: Any) -> FocalNetConfig:
        """The configuration of a published variant, such as "tiny_lrf" or "large_fl4". ``fields`` override its values.

        Raises:
            ValueError: no variant has that name; the message lists them.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        return cls(**{**VARIANTS[variant].config_fields(), **fields})

    @property
    def stage_dims(self) -> list[int]:
        """Number of channels of each stage, before its downsampling."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields to save. Ours are omitted at their defaults, so that the JSON equals that of transformers."""
        fields = super().to_diff_dict()
        for name, default in _OWN_FIELDS.items():
            if fields.get(name, default) == default:
                fields.pop(name, None)
        return fields

    def validate_fields(self) -> None:
        """Check every field. Models call this again, because a configuration may have been modified since it was made.

        Raises:
            ValueError, TypeError: a field is invalid; the message names it with the given and the expected value.
        """
        for name, (expectation, fits) in _FIELDS.items():
            value = getattr(self, name)
            if not fits(value):
                raise _error(name, expectation, value)
        for name in ("focal_levels", "focal_windows"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name}: expected {len(self.depths)} values, one for each stage in depths={list(self.depths)}, "
                    f"got {len(getattr(self, name))}: {list(getattr(self, name))}"
                )
        if self.stem_padding is not None and not self.use_conv_embed:
            raise ValueError(
                f"stem_padding: expected None without use_conv_embed, got {self.stem_padding}; "
                f"patches that do not overlap have no padding"
            )

    def _select_outputs(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        # The JSON stores both, so loading passes both. out_features take precedence, and out_indices must agree.
        if out_features is None:
            indices: Any = out_indices  # the mixin's setter takes None too
            self.out_indices = indices
            return
        self.out_features = list(out_features)
        if out_indices is None:
            return
        if [self.stage_names[index] for index in out_indices] != self.out_features:
            raise ValueError(
                f"out_features, out_indices: expected the same stages of {self.stage_names}, "
                f"got {list(out_features)} and {list(out_indices)}; give one of the two"
            )
        self._out_indices = list(out_indices)


_OWN_FIELDS = {
    "feature_maps_before_downsampling": False,
    "use_feature_map_norms": False,
    "stem_padding": None,
    "drop_incomplete_patches": None,
}


def _error(name: str, expectation: str, value: object) -> Exception:
    # ValueError for a number, a list or an activation's name that is out of range; TypeError for any other value.
    numbers = (int, float, list, tuple)
    kind = ValueError if isinstance(value, numbers) and not isinstance(value, bool) else TypeError
    if name == "hidden_act" and isinstance(value, str):
        kind = ValueError
    return kind(f"{name}: expected {expectation}, got {value!r}")


def _is_int(value: object, least: int = 1) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(fits, value))


def _is_size(value: object) -> bool:
    return _is_int(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_int, value)))


_SIZE = ("an int or a pair of ints of at least 1", _is_size)
_COUNT = ("an int of at least 1", _is_int)
_COUNTS = ("a list of ints of at least 1, one for each stage", _is_list_of(_is_int))
_FLAG = ("a bool", lambda value: isinstance(value, bool))
_PROBABILITY = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_NUMBER = ("a number", _is_number)
_POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0)

_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image_size": _SIZE,
    "patch_size": _SIZE,
    "num_channels": _COUNT,
    "embed_dim": _COUNT,
    "use_conv_embed": _FLAG,
    "hidden_sizes": ("a list of ints of at least 1", _is_list_of(_is_int)),
    "depths": _COUNTS,
    "focal_levels": _COUNTS,
    "focal_windows": (
        "a list of odd ints of at least 1, one for each stage",
        _is_list_of(lambda window: _is_int(window) and window % 2 == 1),
    ),
    "hidden_act": (
        f"one of {', '.join(sorted({*ACT2CLS, *_MISSING_FROM_ACT2FN}))}",
        lambda name: isinstance(name, str) and (name in ACT2CLS or name in _MISSING_FROM_ACT2FN),
    ),
    "mlp_ratio": _POSITIVE,
    "hidden_dropout_prob": _PROBABILITY,
    "drop_path_rate": _PROBABILITY,
    "use_layerscale": _FLAG,
    "layerscale_value": _NUMBER,
    "use_post_layernorm": _FLAG,
    "use_post_layernorm_in_modulation": _FLAG,
    "normalize_modulator": _FLAG,
    "initializer_range": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "layer_norm_eps": _POSITIVE,
    "encoder_stride": _COUNT,
    "feature_maps_before_downsampling": _FLAG,
    "use_feature_map_norms": _FLAG,
    "stem_padding": (
        "None or an int of at least 0",
        lambda value: value is None or _is_int(value, least=0),
    ),
    "drop_incomplete_patches": ("None or a bool", lambda value: value is None or isinstance(value, bool)),
}

"""The published variants, as the authors trained them (Yang et al., arXiv:2203.11926, and their model zoo)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A published model. ``normalize_modulator`` is None if published sources contradict each other."""

    embed_dim: int
    depths: tuple[int, ...]
    levels: int
    window: int = 3
    patch_size: int = 4
    image_size: int = 224
    num_labels: int = 1000
    drop_path_rate: float = 0.2
    use_conv_embed: bool = False
    use_post_layernorm: bool = False
    use_layerscale: bool = False
    use_post_layernorm_in_modulation: bool = False
    normalize_modulator: bool | None = False
    hub: str | None = None

    def config_fields(self) -> dict[str, Any]:
        """Arguments of FocalNetConfig. ``normalize_modulator`` is omitted if it is None."""
        stages = len(self.depths)
        stride = self.patch_size * 2 ** (stages - 1)
        dims = [self.embed_dim * 2**stage for stage in range(stages)]
        fields = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "use_conv_embed": self.use_conv_embed,
            "hidden_sizes": [*dims[1:], dims[-1]],
            "depths": list(self.depths),
            "focal_levels": [self.levels] * stages,
            "focal_windows": [self.window] * stages,
            "drop_path_rate": self.drop_path_rate,
            "use_layerscale": self.use_layerscale,
            "use_post_layernorm": self.use_post_layernorm,
            "use_post_layernorm_in_modulation": self.use_post_layernorm_in_modulation,
            "encoder_stride": stride,
            "num_labels": self.num_labels,
        }
        if self.normalize_modulator is not None:
            fields["normalize_modulator"] = self.normalize_modulator
        return fields


_TINY, _DEEP, _ISO = (2, 2, 6, 2), (2, 2, 18, 2), (12,)


def _isotropic(embed_dim: int, **fields: Any) -> Variant:
    return Variant(embed_dim, _ISO, levels=3, patch_size=16, **fields)


def _large(embed_dim: int, levels: int, window: int, **fields: Any) -> Variant:
    """The ImageNet-22K models: overlapping patches, LayerNorm after the branches, layer scale."""
    fields = {"image_size": 384, **fields}
    return Variant(
        embed_dim,
        _DEEP,
        levels,
        window,
        num_labels=21842,
        drop_path_rate=0.5,
        use_conv_embed=True,
        use_post_layernorm=True,
        use_layerscale=True,
        **fields,
    )


VARIANTS: dict[str, Variant] = {
    "tiny_srf": Variant(96, _TINY, levels=2, hub="microsoft/focalnet-tiny"),
    "tiny_lrf": Variant(96, _TINY, levels=3, hub="microsoft/focalnet-tiny-lrf"),
    "small_srf": Variant(96, _DEEP, levels=2, drop_path_rate=0.3, hub="microsoft/focalnet-small"),
    "small_lrf": Variant(96, _DEEP, levels=3, drop_path_rate=0.3, hub="microsoft/focalnet-small-lrf"),
    "base_srf": Variant(128, _DEEP, levels=2, drop_path_rate=0.5, hub="microsoft/focalnet-base"),
    "base_lrf": Variant(128, _DEEP, levels=3, drop_path_rate=0.5, hub="microsoft/focalnet-base-lrf"),
    "tiny_iso": _isotropic(192),
    "small_iso": _isotropic(384),
    "base_iso": _isotropic(768, use_layerscale=True, use_post_layernorm=True),
    "large_fl3": _large(192, levels=3, window=5, hub="microsoft/focalnet-large-lrf-fl3"),
    # The authors' training configuration and FocalNet-DINO divide by L + 1; the converted checkpoints of transformers
    # and timm do not.
    "large_fl4": _large(192, levels=4, window=3, normalize_modulator=None, hub="microsoft/focalnet-large-lrf-fl4"),
    "xlarge_fl3": _large(256, levels=3, window=5),
    # Unset in the authors' classification configuration, true in FocalNet-DINO.
    "xlarge_fl4": _large(256, levels=4, window=3, normalize_modulator=None),
    "huge_fl3": _large(352, levels=3, window=3, image_size=224, use_post_layernorm_in_modulation=True),
    "huge_fl4": _large(352, levels=4, window=3, image_size=224, use_post_layernorm_in_modulation=True),
}

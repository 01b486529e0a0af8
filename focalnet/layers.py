"""The parts of a FocalNet from the stem to the last stage: patch embeddings, blocks, stages.

Everything between the stem's convolution and the head is channels-last, ``(B, H, W, C)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import fused_block
from .configuration import FocalNetConfig
from .mlp import DropPath, FocalNetMlp
from .modules import FocalModulation

TokensAndMap = tuple[Tensor, Tensor]


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """``size`` as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class FocalNetPatchEmbeddings(nn.Module):
    """Patches to channels by a strided convolution, ``(B, H, W, C_in) -> (B, ceil(H / s), ceil(W / s), C_out)``.

    Images whose size is not a multiple of the patch size are padded with zeros at the bottom and the right.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: tuple[int, int], conv: nn.Conv2d) -> None:
        super().__init__()
        self.num_channels = in_channels
        self.patch_size = patch_size
        self.projection = conv
        self.norm: nn.LayerNorm | None = None

    @classmethod
    def stem(cls, config: FocalNetConfig) -> FocalNetPatchEmbeddings:
        patch_size = as_pair(config.patch_size)
        if config.use_conv_embed:
            padding = 2 if config.stem_padding is None else config.stem_padding
            conv = nn.Conv2d(config.num_channels, config.embed_dim, kernel_size=7, stride=4, padding=padding)
        else:
            conv = nn.Conv2d(config.num_channels, config.embed_dim, kernel_size=patch_size, stride=patch_size)
        return cls(config.num_channels, config.embed_dim, patch_size, conv)

    @classmethod
    def downsampling(cls, config: FocalNetConfig, dim: int) -> FocalNetPatchEmbeddings:
        """Between two stages: half the size, twice the channels, then a LayerNorm."""
        if config.use_conv_embed:
            conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        else:
            conv = nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2)
        embeddings = cls(dim, 2 * dim, (2, 2), conv)
        embeddings.norm = nn.LayerNorm(2 * dim, eps=config.layer_norm_eps)
        return embeddings

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        bottom, right = -height % self.patch_size[0], -width % self.patch_size[1]
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        # A channels-last input makes the convolution write channels-last: the image is the smaller thing to reorder.
        nchw = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = self.projection(nchw).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class FocalNetEmbeddings(nn.Module):
    """Images (B, num_channels, H, W) to normalised patches (B, h, w, embed_dim); masked ones become the mask token."""

    def __init__(self, config: FocalNetConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.patch_embeddings = FocalNetPatchEmbeddings.stem(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        self._check_images(pixel_values)
        # The image processors give float32 whatever the model's dtype is.
        pixel_values = pixel_values.to(self.patch_embeddings.projection.weight.dtype)
        embeddings = self.norm(self.patch_embeddings(pixel_values.permute(0, 2, 3, 1)))
        if bool_masked_pos is not None:
            masked = self._mask_of_grid(bool_masked_pos, embeddings)
            embeddings = torch.where(masked, self.mask_token, embeddings)
        return self.dropout(embeddings)

    def _check_images(self, pixel_values: Tensor | None) -> None:
        channels = self.patch_embeddings.num_channels
        if pixel_values is None:
            raise ValueError(f"You have to specify pixel_values: expected images (B, {channels}, H, W), got None")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values: expected shape (B, {channels}, H, W), since config.num_channels is {channels}, "
                f"got {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values: expected floating point, got {pixel_values.dtype}; an image processor "
                f"(AutoImageProcessor) rescales and normalises integer images"
            )

    def _mask_of_grid(self, bool_masked_pos: Tensor, embeddings: Tensor) -> Tensor:
        batch, height, width, _ = embeddings.shape
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos: this model has no mask token to put at masked positions; "
                "make it with use_mask_token=True, or use FocalNetForMaskedImageModeling"
            )
        if tuple(bool_masked_pos.shape) != (batch, height * width):
            raise ValueError(
                f"bool_masked_pos: expected shape ({batch}, {height * width}), one value for each patch of the "
                f"{height} x {width} grid, got {tuple(bool_masked_pos.shape)}"
            )
        return bool_masked_pos.bool().view(batch, height, width, 1)


class FocalNetLayer(GradientCheckpointingLayer):
    """One block: focal modulation, then an MLP, each a residual branch. (B, H, W, dim) -> (B, H, W, dim).

    Gradient checkpointing recomputes one block at a time.
    """

    def __init__(self, config: FocalNetConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.stage_dims[stage]
        self.use_post_layernorm = config.use_post_layernorm
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.modulation = FocalModulation(
            dim,
            focal_window=config.focal_windows[stage],
            focal_level=config.focal_levels[stage],
            proj_drop=config.hidden_dropout_prob,
            use_post_layernorm_in_modulation=config.use_post_layernorm_in_modulation,
            normalize_modulator=config.normalize_modulator,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = FocalNetMlp(config, dim)
        self.gamma_1 = self.gamma_2 = None
        if config.use_layerscale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(config.layerscale_value)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(config.layerscale_value)))

    def train(self, mode: bool = True) -> FocalNetLayer:
        fused_block.forget(self)
        return super().train(mode)

    def forward(self, hidden_state: Tensor) -> Tensor:
        if fused_block.reason_against(self, hidden_state) is None:
            return fused_block.run(self, hidden_state)
        hidden_state = self._residual(hidden_state, self.norm1, self.modulation, self.gamma_1)
        return self._residual(hidden_state, self.norm2, self.mlp, self.gamma_2)

    def _residual(self, hidden_state: Tensor, norm: nn.Module, branch: nn.Module, gamma: Tensor | None) -> Tensor:
        update = norm(branch(hidden_state)) if self.use_post_layernorm else branch(norm(hidden_state))
        if gamma is not None:
            update = gamma * update
        return hidden_state + self.drop_path(update)


class FocalNetStage(nn.Module):
    """Blocks of one width, then the downsampling to the next stage, if there is one."""

    def __init__(self, config: FocalNetConfig, stage: int) -> None:
        super().__init__()
        first = sum(config.depths[:stage])
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.layers = nn.ModuleList(
            FocalNetLayer(config, stage, rates[first + layer]) for layer in range(config.depths[stage])
        )
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else FocalNetPatchEmbeddings.downsampling(config, config.stage_dims[stage])

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> the maps after and before the downsampling; the same one where there is none."""
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        return hidden_state if self.downsample is None else self.downsample(hidden_state), hidden_state


class FocalNetEncoder(nn.Module):
    """All stages, one after the other."""

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(FocalNetStage(config, stage) for stage in range(len(config.depths)))

    def forward(
        self, hidden_state: Tensor, collect: bool = False, before_downsampling: bool = False
    ) -> tuple[Tensor, tuple[TokensAndMap, ...]]:
        """(B, H, W, C) -> the last map, and with ``collect`` what the stem and every stage gave."""
        taps: tuple[TokensAndMap, ...] = ()
        if collect:
            hidden_state, taps = _tap(hidden_state, taps)
        for stage in self.stages:
            hidden_state, before = stage(hidden_state)
            if collect and before_downsampling:
                _, taps = _tap(before, taps)
            elif collect:
                hidden_state, taps = _tap(hidden_state, taps)
        return hidden_state, taps


def _tap(hidden_state: Tensor, taps: tuple[TokensAndMap, ...]) -> tuple[Tensor, tuple[TokensAndMap, ...]]:
    """Adds (tokens (B, H * W, C), map (B, C, H, W)) of ``hidden_state`` (B, H, W, C), and returns it again.

    What is returned is made from the tokens: so they lie on the way to the loss, and have a gradient to retain.
    """
    tokens = hidden_state.flatten(1, 2)
    hidden_state = tokens.unflatten(1, hidden_state.shape[1:3])
    return hidden_state, (*taps, (tokens, hidden_state.permute(0, 3, 1, 2)))

"""The parts of a FocalNet from the stem to the last stage: embeddings, blocks, stages.

Everything between the stem's convolution and the head is channels-last, ``(B, H, W, C)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backends.registry import requested
from ..configuration import FocalNetConfig
from ..fusion import cpu_block, gpu_block
from ..fusion.block_parts import BlockParts
from ..fusion.cpu_inference import Precision, why_not_call
from ..fusion.gate import while_unchanged
from ..fusion.module_checks import all_are_watched, is_changed
from ..fusion.part_names import BLOCK
from ..modules import FocalModulation
from . import patch_embeddings
from .mlp import DropPath, FocalNetMlp
from .patch_embeddings import FocalNetPatchEmbeddings

TokensAndMap = tuple[Tensor, Tensor]
OURS = BlockParts(BLOCK["transformers"], modulation=FocalModulation, mlp=FocalNetMlp)


class FocalNetEmbeddings(nn.Module):
    """Images (B, num_channels, H, W) to normalised patches (B, h, w, embed_dim), with masked patches replaced.

    The replacement is the learned mask token; a model without one raises ValueError if a mask is given.
    """

    def __init__(self, config: FocalNetConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.patch_embeddings = FocalNetPatchEmbeddings.stem(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        if not isinstance(pixel_values, torch.fx.Proxy):
            self._check_images(pixel_values)
        # Image processors return float32 for models of any dtype.
        pixel_values = pixel_values.to(self.patch_embeddings.projection.weight.dtype)
        images = pixel_values.permute(0, 2, 3, 1)
        found = why_not_call(images) or _stem_call(self, Precision.of(images), requested(None))
        if isinstance(found, str):
            return self.dropout(self._masked(bool_masked_pos, self.norm(self.patch_embeddings(images))))
        return self._embedded(images, bool_masked_pos, StemCall(*found))

    def by_operator(self, pixel_values: Tensor, bool_masked_pos: Tensor | None, call: StemCall) -> Tensor:
        """The result of forward, computed by an operator; ``call`` is what `stem_call` found."""
        self._check_images(pixel_values)
        images = pixel_values.to(call.weight_dtype).permute(0, 2, 3, 1)
        return self._embedded(images, bool_masked_pos, call)

    def _embedded(self, images: Tensor, bool_masked_pos: Tensor | None, call: StemCall) -> Tensor:
        # The operator runs only where the dropout does nothing.
        return self._masked(bool_masked_pos, patch_embeddings.run(images, call.arguments))

    def _check_images(self, pixel_values: Tensor | None) -> None:
        channels = self.patch_embeddings.num_channels
        if pixel_values is None:
            raise ValueError(f"You have to specify pixel_values: expected images (B, {channels}, H, W), got None")
        if not isinstance(pixel_values, (Tensor, torch.fx.Proxy)):
            raise TypeError(f"pixel_values: expected a torch.Tensor (B, {channels}, H, W), {_what_came(pixel_values)}")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            shape = tuple(pixel_values.shape)
            hint = "; channels come first here: .permute(0, 3, 1, 2)" if shape[3:] == (channels,) else ""
            raise ValueError(
                f"pixel_values: expected shape (B, {channels}, H, W) because config.num_channels is {channels}, "
                f"got {shape}{hint}"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values: expected floating point, got {pixel_values.dtype}; use an image processor "
                f"(AutoImageProcessor) to rescale and normalise integer images"
            )

    def _masked(self, bool_masked_pos: Tensor | None, embeddings: Tensor) -> Tensor:
        if bool_masked_pos is None:
            return embeddings
        batch, height, width, _ = embeddings.shape
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos: this model has no mask token, so expected None, got a mask; "
                "make it with use_mask_token=True, or use FocalNetForMaskedImageModeling"
            )
        if tuple(bool_masked_pos.shape) != (batch, height * width):
            raise ValueError(
                f"bool_masked_pos: expected shape ({batch}, {height * width}), one value for each patch of the "
                f"{height} x {width} grid, got {tuple(bool_masked_pos.shape)}"
            )
        return torch.where(bool_masked_pos.bool().view(batch, height, width, 1), self.mask_token, embeddings)


class StemCall(NamedTuple):
    """The call that computes the stem, and the dtype of its weights, to which images are converted."""

    arguments: list[Any]
    weight_dtype: torch.dtype


def stem_call(stem: FocalNetEmbeddings, precision: Precision, backend: str | None) -> tuple[Any, ...] | str:
    """The fields of `StemCall`, or the reason why the modules of the stem must be called."""
    dropout = stem.dropout
    if type(dropout) is not nn.Dropout or is_changed(dropout) or (dropout.training and dropout.p > 0):
        return "dropout was replaced, wrapped or hooked, or drops something"
    found = patch_embeddings.call(stem.patch_embeddings, stem.norm, precision, backend, own_threads=True)
    return found if isinstance(found, str) else (found, stem.patch_embeddings.projection.weight.dtype)


_stem_call = while_unchanged(stem_call)


def _what_came(images: object) -> str:
    """The part of an error message that names the given object and how to convert it to a tensor of images."""
    name = f"{type(images).__module__}.{type(images).__qualname__}".removeprefix("builtins.")
    if isinstance(images, Mapping):
        return f"got {name}, a mapping of named arguments: call model(**inputs)"
    processor = 'an image processor makes one: model(**processor(images, return_tensors="pt"))'
    if hasattr(images, "__array_interface__") and hasattr(images, "shape"):
        converted = "torch.from_numpy(array) if the array is already preprocessed and channels-first"
        return f"got {name} of shape {images.shape}; pass {converted}; otherwise {processor}"
    return f"got {name}; {processor}"


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

    @property
    def backend(self) -> str | None:
        """The backend requested for the modulation, or None. A replaced modulation may not have the attribute."""
        return getattr(self.modulation, "backend", None)

    def forward(self, hidden_state: Tensor) -> Tensor:
        run: Callable[[Tensor], Tensor] | str = "gradients are being computed"
        if not torch.is_grad_enabled():
            run = cpu_block.runner(self, OURS, hidden_state, self.backend)
        if isinstance(run, str):
            run = gpu_block.runner(self, OURS, hidden_state, self.backend)
        if not isinstance(run, str):
            return run(hidden_state)
        hidden_state = self._residual(hidden_state, self.norm1, self.modulation, self.gamma_1)
        return self._residual(hidden_state, self.norm2, self.mlp, self.gamma_2)

    def _residual(self, hidden_state: Tensor, norm: nn.Module, branch: nn.Module, gamma: Tensor | None) -> Tensor:
        if self.use_post_layernorm:
            return self.add(hidden_state, norm(branch(hidden_state)), gamma)
        return self.add(hidden_state, self.branch_of_normed(branch, norm, hidden_state), gamma)

    def branch_of_normed(self, branch: nn.Module, norm: nn.Module, hidden_state: Tensor) -> Tensor:
        """``branch(norm(hidden_state))``, (B, H, W, dim) -> (B, H, W, dim), fused if the branch supports it."""
        is_taken = not (is_changed(branch) or all_are_watched())
        if is_taken and (type(branch) is FocalModulation or type(branch) is FocalNetMlp):
            return branch.of_normed(norm, hidden_state, backend=self.backend)
        return branch(norm(hidden_state))

    def add(self, hidden_state: Tensor, update: Tensor, gamma: Tensor | None) -> Tensor:
        """``hidden_state + drop_path(gamma * update)``; without layer scale ``gamma`` is None."""
        if gamma is not None:
            update = gamma * update
        if type(self.drop_path) is DropPath and not is_changed(self.drop_path):
            return self.drop_path.add(hidden_state, update)
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
        """(B, H, W, C) -> the maps after and before the downsampling, equal if the stage has no downsampling."""
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        return hidden_state if self.downsample is None else self.downsample(hidden_state), hidden_state


class FocalNetEncoder(nn.Module):
    """All stages in sequence."""

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(FocalNetStage(config, stage) for stage in range(len(config.depths)))

    def forward(
        self, hidden_state: Tensor, collect: bool = False, before_downsampling: bool = False
    ) -> tuple[Tensor, tuple[TokensAndMap, ...]]:
        """(B, H, W, C) -> the last map, and with ``collect`` the tokens and maps of the stem and of every stage.

        Maps are taken after each stage's downsampling, or before it with ``before_downsampling``.
        """
        # Check everything once, before the first block: each operator evicts Python's objects from the CPU caches, so
        # a check between two blocks would be slower.
        found = why_not_call(hidden_state) or _calls(self, Precision.of(hidden_state), requested(None))
        stages: Any = self.stages if isinstance(found, str) else stages_of(found)
        return run_stages(stages, hidden_state, collect, before_downsampling)


Stage = Callable[[Tensor], tuple[Tensor, Tensor]]


def run_stages(
    stages: Iterable[Stage], hidden_state: Tensor, collect: bool, before_downsampling: bool = False
) -> tuple[Tensor, tuple[TokensAndMap, ...]]:
    """The result of an encoder's forward, by the stages themselves or by `stages_of`."""
    taps: tuple[TokensAndMap, ...] = ()
    if collect:
        hidden_state, taps = _tap(hidden_state, taps)
    for stage in stages:
        hidden_state, before = stage(hidden_state)
        if collect and before_downsampling:
            _, taps = _tap(before, taps)
        elif collect:
            hidden_state, taps = _tap(hidden_state, taps)
    return hidden_state, taps


def stages_of(calls: Sequence[Any]) -> list[Stage]:
    """Functions that compute the stages by the operators that `calls_of` found."""
    return [functools.partial(_run_stage, of_stage) for of_stage in calls]


def _run_stage(calls: Sequence[Any], hidden_state: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a stage's forward, computed by its part of what `calls_of` found."""
    blocks, downsampling = calls
    for operator, arguments in blocks:
        hidden_state = operator(hidden_state, *arguments)
    return hidden_state if downsampling is None else patch_embeddings.run(hidden_state, downsampling), hidden_state


def calls_of(encoder: FocalNetEncoder, precision: Precision, around: str | None) -> list[Any] | str:
    """For each stage, the operator calls of its blocks and that of its downsampling (None if it has none).

    Only CPU inference has these operators. Returns the reason as a string if any module must be called itself.
    ``around`` is the backend requested by context or environment.
    """
    found = []
    for stage in encoder.stages._modules.values():
        calls = _calls_of_stage(stage, precision, around)
        if isinstance(calls, str):
            return calls
        found.append(calls)
    return found


_calls = while_unchanged(calls_of)


def _calls_of_stage(stage: nn.Module, precision: Precision, around: str | None) -> list[Any] | str:
    if type(stage) is not FocalNetStage or is_changed(stage):
        return "a stage was replaced, wrapped or hooked"
    blocks: list[Any] = list(stage.layers._modules.values())
    downsample = stage.downsample
    if any(type(block) is not FocalNetLayer or is_changed(block) for block in blocks):
        return "a block was replaced, wrapped or hooked"
    found = [cpu_block.call(block, OURS, precision, block.backend or around, own_threads=True) for block in blocks]
    downsampling = None
    if downsample is not None:
        norm = downsample._modules.get("norm")
        downsampling = patch_embeddings.call(downsample, norm, precision, around, own_threads=True)
    return next((reason for reason in (*found, downsampling) if isinstance(reason, str)), [found, downsampling])


def _tap(hidden_state: Tensor, taps: tuple[TokensAndMap, ...]) -> tuple[Tensor, tuple[TokensAndMap, ...]]:
    """Append (tokens (B, H * W, C), map (B, C, H, W)) of ``hidden_state`` (B, H, W, C) to ``taps``.

    The returned hidden state is a view of the tokens. The loss then depends on the tokens, so that they receive a
    gradient and ``retain_grad`` works on them.
    """
    tokens = hidden_state.flatten(1, 2)
    hidden_state = tokens.view(hidden_state.shape)
    return hidden_state, (*taps, (tokens, hidden_state.permute(0, 3, 1, 2)))

"""The patch embeddings of the stem and of the downsamplings between stages: a strided convolution. In CPU inference
the convolution and the LayerNorm after it are one operator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.registry import requested
from ..configuration import FocalNetConfig
from ..fusion import cpu_patch_embed
from ..fusion.cpu_inference import Precision, why_not_call
from ..fusion.gate import while_unchanged
from ..fusion.module_checks import is_changed, is_proxy
from .padding import pad_to_multiple


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """``size`` as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class FocalNetPatchEmbeddings(nn.Module):
    """A strided convolution of patches, ``(B, H, W, C_in) -> (B, ceil(H / s), ceil(W / s), C_out)``.

    A map is padded with zeros at the bottom and the right to a multiple of the patch size. With ``drops_incomplete``
    it is not padded, and rows and columns that do not fill a patch are dropped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: tuple[int, int],
        conv: nn.Conv2d,
        drops_incomplete: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels = in_channels
        self.patch_size = patch_size
        self.drops_incomplete = drops_incomplete
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
        return cls(config.num_channels, config.embed_dim, patch_size, conv, bool(config.drop_incomplete_patches))

    @classmethod
    def downsampling(cls, config: FocalNetConfig, dim: int) -> FocalNetPatchEmbeddings:
        """The downsampling between two stages: half the height and width, twice the channels, then a LayerNorm."""
        if config.use_conv_embed:
            conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        else:
            conv = nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2)
        embeddings = cls(dim, 2 * dim, (2, 2), conv, bool(config.drop_incomplete_patches))
        embeddings.norm = nn.LayerNorm(2 * dim, eps=config.layer_norm_eps)
        return embeddings

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return self._by_modules(x)
        found = why_not_call(x) or _own_call(self, Precision.of(x), requested(None))
        return self.norm(self._by_modules(x)) if isinstance(found, str) else run(x, found)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of the grid of patches for a map of this size.

        Raises:
            ValueError: incomplete patches are dropped and the map is smaller than one patch.
        """
        grid_of = _grid.__wrapped__ if torch.compiler.is_compiling() else _grid  # sizes may be symbols
        return grid_of(height, width, *self.geometry)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Kernel size, stride, padding, and the patch size to whose multiple a map is filled up, or None."""
        conv: Any = self.projection
        return conv.kernel_size, conv.stride, conv.padding, None if self.drops_incomplete else self.patch_size

    def _by_modules(self, x: Tensor) -> Tensor:
        if not self.drops_incomplete:
            x = pad_to_multiple(x, self.patch_size)
        elif not is_proxy(x):
            self.output_size(*x.shape[1:3])  # raises if there is no whole patch
        # A channels-last input makes the convolution write channels-last. Reordering the input costs less than
        # reordering the output, which is larger.
        nchw = x.contiguous().permute(0, 3, 1, 2)
        return self.projection(nchw).permute(0, 2, 3, 1)


@functools.lru_cache
def _grid(
    height: int,
    width: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    patch_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """The windows of a map that is filled up to a multiple of ``patch_size``, unless that is None, and then padded."""
    if patch_size is not None:
        height, width = height + -height % patch_size[0], width + -width % patch_size[1]
    rows = (height + 2 * padding[0] - kernel_size[0]) // stride[0] + 1
    columns = (width + 2 * padding[1] - kernel_size[1]) // stride[1] + 1
    if patch_size is None and min(rows, columns) < 1:
        raise ValueError(
            f"pixel_values: expected larger images because config.drop_incomplete_patches is set, got a map of "
            f"{height} x {width}, smaller than a patch of {kernel_size[0]} x {kernel_size[1]}"
        )
    return rows, columns


def call(
    embeddings: nn.Module,
    norm: nn.Module | None,
    precision: Precision,
    backend: str | None,
    *,
    is_owner: bool = False,
    own_threads: bool = False,
) -> list[Any] | str:
    """The call for `run` that computes ``norm(embeddings(x))``, or the reason why the modules must be called.

    ``is_owner``: ``norm`` is a part of ``embeddings``, and its own forward is asking. ``own_threads`` is explained at
    `cpu_block.call`.
    """
    if type(embeddings) is not FocalNetPatchEmbeddings or (is_changed(embeddings) and not is_owner):
        return "the embeddings were replaced, wrapped or hooked"
    projection = embeddings._modules["projection"]
    found = cpu_patch_embed.call(projection, norm, precision, backend, own_threads=own_threads)
    return found if isinstance(found, str) else [found, embeddings.geometry]


def run(x: Tensor, call: list[Any]) -> Tensor:
    """``norm(embeddings(x))``, computed by one operator. Looks at no module: those have left the CPU's caches."""
    operation, geometry = call
    return cpu_patch_embed.run(x, _grid(*x.shape[1:3], *geometry), operation)


@while_unchanged
def _own_call(embeddings: FocalNetPatchEmbeddings, precision: Precision, backend: str | None) -> list[Any] | str:
    return call(embeddings, embeddings.norm, precision, backend, is_owner=True)

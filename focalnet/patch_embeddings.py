"""Patches to channels, the stem's and those between stages: a strided convolution, in CPU inference with its LayerNorm
as one operator, a matrix product on channels-last tokens with weights that are packed once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration import FocalNetConfig
from .packing import arguments_of, forget, packed_of, reason_against_call
from .padding import pad_to_multiple
from .plain import is_changed


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

    def train(self, mode: bool = True) -> FocalNetPatchEmbeddings:
        forget(self)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self._by_modules(x) if self.norm is None else embed(self, self, self.norm, x)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The grid of patches that a map of this size gives."""
        conv, sizes = self.projection, (height, width)
        padded = (
            size + -size % patch + 2 * pad
            for size, patch, pad in zip(sizes, self.patch_size, conv.padding, strict=True)
        )
        return tuple((n - k) // s + 1 for n, k, s in zip(padded, conv.kernel_size, conv.stride, strict=True))

    def _by_modules(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.patch_size)
        # A channels-last input makes the convolution write channels-last: the image is the smaller thing to reorder.
        nchw = x.contiguous().permute(0, 3, 1, 2)
        return self.projection(nchw).permute(0, 2, 3, 1)


def embed(owner: nn.Module, embeddings: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(embeddings(x))``, where ``owner`` holds both."""
    if reason_against(owner, embeddings, norm, x) is None:
        return run(owner, embeddings, x)
    patches = embeddings._by_modules(x) if embeddings is owner else embeddings(x)
    return norm(patches)


def run(owner: nn.Module, embeddings: FocalNetPatchEmbeddings, x: Tensor) -> Tensor:
    """`embed` where `reason_against` has nothing against it."""
    packed = arguments_of(owner)
    size = embeddings.output_size(*x.shape[1:3])
    return torch.ops.focalnet.cpu_patch_embed(x, *packed[:4], size, *packed[4:])


def reason_against(owner: nn.Module, embeddings: nn.Module, norm: nn.Module, x: Tensor) -> str | None:
    """Why the fused operator cannot take this call, or None if it can."""
    if reason := reason_against_call(x, None):
        return reason
    if type(embeddings) is not FocalNetPatchEmbeddings or type(embeddings.projection) is not nn.Conv2d:
        return "expected FocalNetPatchEmbeddings with a Conv2d"
    hooked = embeddings is not owner and is_changed(embeddings)

    def reason() -> str | None:
        return "the embeddings were wrapped or hooked" if hooked else _unusual_part(embeddings.projection, norm)

    return packed_of(owner, (), reason, lambda: _pack(embeddings.projection, norm)).reason


def _unusual_part(conv: nn.Conv2d, norm: nn.Module) -> str | None:
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return f"the norm is {type(norm).__name__}; expected LayerNorm with weight and bias"
    if norm.normalized_shape != (conv.out_channels,):
        return f"the norm is over {norm.normalized_shape}; expected the {conv.out_channels} channels"
    if is_changed(conv) or is_changed(norm):
        return "the convolution or the norm was wrapped or hooked"
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "the convolution is grouped, dilated, or padded with something else than a number of zeros"
    return None


def _pack(conv: nn.Conv2d, norm: nn.LayerNorm) -> tuple:
    """The arguments of the operator after the input, without the output's size; a patch is flattened as (y, x, c)."""
    return (
        _packed(conv),
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.out_channels,
        norm.weight,
        norm.bias,
        norm.eps,
    )


def _packed(conv: nn.Conv2d, features: int = 128) -> Tensor:
    """What cpu_pack_linear makes of the weight, some features at a time: a large one is not there three times over."""
    whole = None
    for first in range(0, conv.out_channels, features):
        part = slice(first, first + features)
        columns = conv.weight[part].permute(0, 2, 3, 1).flatten(1)
        panels = torch.ops.focalnet.cpu_pack_linear(columns, None if conv.bias is None else conv.bias[part], None)
        if whole is None:
            width = panels.shape[2]
            whole = panels.new_empty(-(-conv.out_channels // width), *panels.shape[1:])
        at = first // width
        whole[at : at + len(panels)] = panels
    return whole

"""Makes operands of the two operators as the models do: views of one packed projection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Shape:
    """The sizes and options of a case. ``kernels`` holds the kernel size of each level."""

    batch: int = 2
    height: int = 5
    width: int = 7
    channels: int = 8
    kernels: tuple = (3, 5)
    normalize: bool = False
    bias: bool = True
    name: str = field(default="", compare=False)

    @property
    def kernel_sizes(self):
        return [(k, k) if isinstance(k, int) else k for k in self.kernels]

    def __str__(self):
        return self.name or f"{self.batch}x{self.height}x{self.width}x{self.channels}-{self.kernels}"


SHAPES = [
    Shape(name="plain"),
    Shape(channels=16, kernels=(3, 5, 7), normalize=True, name="three levels, normalised"),
    Shape(kernels=(3,), name="one level"),
    Shape(kernels=(3, 5, 7, 9), name="four levels"),
    Shape(batch=0, name="empty batch"),
    Shape(height=1, width=1, name="1x1 map"),
    Shape(height=1, width=9, name="1xN map"),
    Shape(height=9, width=1, name="Nx1 map"),
    Shape(height=2, width=3, kernels=(7, 9), name="kernels larger than the map"),
    Shape(kernels=((3, 5), (1, 7)), name="rectangular kernels"),
    Shape(kernels=(1,), name="1x1 kernel"),
    Shape(channels=1, name="one channel"),
    Shape(channels=13, bias=False, name="odd channels, no bias"),
]


def operands(shape, dtype=torch.float32, device="cpu", seed=0, requires_grad=False):
    """(q, ctx, gates, focal_weights, weight, bias); q, ctx and gates are strided views of one tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)

    channels, levels = shape.channels, len(shape.kernels)
    packed = normal(shape.batch, shape.height, shape.width, 2 * channels + levels + 1)
    q, ctx, gates = packed.split([channels, channels, levels + 1], dim=-1)
    focal_weights = [normal(channels, 1, kh, kw, scale=2 / (kh * kw) ** 0.5) for kh, kw in shape.kernel_sizes]
    weight = normal(channels, channels, scale=channels**-0.5)
    return q, ctx, gates, focal_weights, weight, normal(channels) if shape.bias else None


def independent(shape, dtype=torch.float64, device="cpu", seed=0):
    """The values of `operands` as separate leaf tensors that require gradients."""
    q, ctx, gates, focal_weights, weight, bias = operands(shape, dtype, device, seed)

    def leaf(tensor):
        return None if tensor is None else tensor.detach().clone().requires_grad_()

    return leaf(q), leaf(ctx), leaf(gates), [leaf(w) for w in focal_weights], leaf(weight), leaf(bias)

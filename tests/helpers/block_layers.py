"""Blocks of modules in evaluation, and what the operator cpu_block takes of them."""

import torch

from focalnet import FocalNetConfig
from focalnet.fusion import cpu_block
from focalnet.fusion.cpu_inference import Precision
from focalnet.models.layers import OURS, FocalNetLayer

FLAGS = [
    {"post": bool(i & 1), "scale": bool(i & 2), "inner": bool(i & 4), "normalize": bool(i & 8)} for i in range(16)
]


def argument_names():
    return [argument.name for argument in torch.ops.focalnet.cpu_block.default._schema.arguments]


def weights(layer):
    """The arguments of cpu_block after its first."""
    return cpu_block.call(layer, OURS, Precision.of(next(layer.parameters())), None)[1]


def make_layer(
    dim,
    levels=3,
    window=3,
    post=False,
    scale=False,
    inner=False,
    normalize=False,
    mlp_ratio=4.0,
    seed=0,
    dtype=torch.float32,
):
    config = FocalNetConfig(
        embed_dim=dim,
        depths=[1],
        focal_levels=[levels],
        focal_windows=[window],
        mlp_ratio=mlp_ratio,
        use_layerscale=scale,
        use_post_layernorm=post,
        use_post_layernorm_in_modulation=inner,
        normalize_modulator=normalize,
    )
    torch.manual_seed(seed)
    layer = FocalNetLayer(config, 0, 0.0).eval().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if "norm" in name or "gamma" in name:
            parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter) if name.endswith("weight") else 0.3)
            if not name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        elif "focal_layers" in name:
            parameter.mul_(3.0)
    # Asked for by name: left to itself, a layer may run the very operator that is tested.
    layer.modulation.backend = "reference"
    return layer.to(dtype)

"""The C++ operator focalnet::cpu_block against the block of modules it stands for, FocalNetLayer in evaluation.

The rule is the project's: the error against float64 is at most twice that of the reference in float32, plus one unit
in the last place of the largest output magnitude.
"""

import math

import pytest
import torch
from instruction_sets import OPS, isa, require, threads  # noqa: F401

from focalnet import FocalNetConfig, fused_block
from focalnet.fused_block import OURS, pack
from focalnet.layers import FocalNetLayer

require("cpu_block")


@torch.no_grad()
def packed(layer):
    """The arguments of cpu_block after its first."""
    return pack(OURS.parts_of(layer))


def unpacked(layer):
    """The same, with the weights of linear layers as the layer has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_block, "WIDEST_PACKED", 0)
        return packed(layer)


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


def ulp(exact):
    largest = exact.abs().max().item()
    return torch.finfo(torch.float32).eps * 2.0 ** math.floor(math.log2(largest))


def check(shape, **options):
    layer, double = make_layer(shape[-1], **options), make_layer(shape[-1], **options, dtype=torch.float64)
    hidden_state = torch.randn(shape)
    ours = OPS.cpu_block(hidden_state, *packed(layer))
    assert ours.shape == hidden_state.shape
    assert ours.is_contiguous()
    if hidden_state.numel():
        exact = double(hidden_state.double())
        allowed = 2 * (layer(hidden_state).double() - exact).abs().max().item() + ulp(exact)
        error = (ours.double() - exact).abs().max().item()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


FLAGS = [
    {"post": bool(i & 1), "scale": bool(i & 2), "inner": bool(i & 4), "normalize": bool(i & 8)} for i in range(16)
]


@pytest.mark.parametrize("dim", [8, 17, 96, 100])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(k for k, v in f.items() if v) or "none")
def test_every_combination_of_flags(isa, flags, dim):
    check((2, 5, 7, dim), **flags)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("dim", [8, 17, 96, 100])
def test_every_shape(isa, dim, size, batch, post):
    check((batch, *size, dim), post=post, scale=True)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_number_of_levels(isa, levels):
    check((3, 9, 8, 24), levels=levels, window=5, normalize=True)


@pytest.mark.parametrize("dim, ratio", [(1, 1.0), (1, 4.0), (3, 0.4), (15, 1.5), (16, 4.0), (33, 9.0), (300, 2.2)])
def test_odd_widths(isa, dim, ratio):
    for post in (False, True):
        check((4, 6, 5, dim), mlp_ratio=ratio, post=post)


@pytest.mark.parametrize("tokens", range(1, 28))
def test_every_number_of_tokens(isa, tokens):
    check((1, tokens, 1, 32), levels=1, seed=tokens)


def test_large_map(isa):
    """Many blocks of tokens, and images in more than one group."""
    check((5, 90, 61, 64), scale=True)


@pytest.mark.parametrize("options", [{}, {"post": True, "inner": True, "scale": True}], ids=["pre", "post"])
@pytest.mark.parametrize(
    "shape",
    [(1, 7, 7, 768), (1, 23, 23, 520), (3, 14, 14, 96), (1, 14, 14, 320), (2, 5, 7, 17), (2, 90, 60, 48)],
    ids=str,
)
def test_bits_do_not_depend_on_threads(isa, shape, options):
    """Nor on the way chosen, by tokens or by columns, or on the images beside: the numbers of threads change both."""
    arguments = packed(make_layer(shape[-1], **options))
    hidden_state = torch.randn(shape)
    expected = OPS.cpu_block(hidden_state, *arguments)
    for n in (1, 2, 4):
        with threads(n):
            assert torch.equal(OPS.cpu_block(hidden_state, *arguments), expected), n
            assert torch.equal(OPS.cpu_block(hidden_state[:1], *arguments), expected[:1]), n


@pytest.mark.parametrize("options", [{}, {"post": True, "inner": True, "scale": True}, {"scale": True}], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 17), (1, 7, 7, 300), (3, 14, 14, 96), (1, 23, 23, 392), (2, 40, 30, 48)], ids=str
)
def test_weights_that_are_not_packed_give_the_same_bits(isa, shape, options):
    """By columns, where each thread packs the slice it uses, and by blocks, for which all are packed before."""
    layer, hidden_state = make_layer(shape[-1], **options), torch.randn(shape)
    arguments, expected = unpacked(layer), OPS.cpu_block(hidden_state, *packed(layer))
    assert arguments[0] is layer.modulation.projection_in.weight
    for n in (1, 4):
        with threads(n):
            assert torch.equal(OPS.cpu_block(hidden_state, *arguments), expected), n


def test_strided_input_gives_the_same_bits():
    arguments = packed(make_layer(24))
    hidden_state = torch.randn(2, 24, 6, 5).permute(0, 2, 3, 1)
    assert torch.equal(OPS.cpu_block(hidden_state, *arguments), OPS.cpu_block(hidden_state.contiguous(), *arguments))


def test_the_input_is_left_alone():
    arguments = packed(make_layer(24, post=True))
    hidden_state = torch.randn(2, 6, 5, 24)
    before = hidden_state.clone()
    OPS.cpu_block(hidden_state, *arguments)
    assert torch.equal(hidden_state, before)


@pytest.mark.parametrize("n, k", [(21, 5), (16, 8), (35, 18), (1, 1)])
def test_pack_linear(isa, n, k):
    """Panels of 16 outputs, [k][output] behind a row of the bias, zero beyond the last output."""
    weight, bias = torch.randn(n, k), torch.randn(n)
    packed = OPS.cpu_pack_linear(weight, bias, None)
    assert packed.shape == (-(-n // 16), 1 + k, 16)
    flat = packed.permute(1, 0, 2).flatten(1)
    assert torch.equal(flat[:, :n], torch.cat([bias[None], weight.T]))
    assert not flat[:, n:].any()
    assert not OPS.cpu_pack_linear(weight, None, None)[:, 0].any()
    scaled = OPS.cpu_pack_linear(weight, bias, scale := torch.randn(n)).permute(1, 0, 2).flatten(1)
    assert torch.equal(scaled[:, :n], torch.cat([bias[None], weight.T]) * scale)


def test_pack_focal(isa):
    """Halved (the GELU takes half of z), in vectors of channels, zero beyond the last channel."""
    weights = [torch.randn(21, 1, 3, 3), torch.randn(21, 1, 1, 5)]
    packed = OPS.cpu_pack_focal(weights)
    lanes = packed.shape[2]
    assert packed.shape == (32 // lanes, 14, lanes)
    by_channel = packed.transpose(1, 2).flatten(0, 1)
    assert torch.equal(by_channel[:21], 0.5 * torch.cat([w.flatten(1) for w in weights], 1))
    assert not by_channel[21:].any()


@pytest.mark.parametrize(
    "weights, message",
    [
        ([torch.zeros(4, 1, 3)], r"focal_weights\[0\] has shape \(4, 1, 3\); expected \(C, 1, kh, kw\)"),
        ([torch.zeros(4, 1, 3, 3), torch.zeros(3, 1, 3, 3)], r"focal_weights\[1\] has shape"),
        ([torch.zeros(4, 1, 3, 2)], r"focal_weights\[0\] has shape .* odd kh and kw"),
        ([torch.zeros(4, 1, 3, 3).double()], r"focal_weights\[0\] has dtype"),
    ],
)
def test_bad_arguments_of_packing_focal_weights_are_named(weights, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_pack_focal(weights)


NAMES = [argument.name for argument in OPS.cpu_block.default._schema.arguments]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hidden_state", lambda t: t[0], r"hidden_state has shape \(6, 5, 24\); expected \(B, H, W, C\)"),
        ("hidden_state", lambda t: t[..., :20], r"projection_in has shape \(52, 24\); expected \(44, 20\)"),
        ("hidden_state", lambda t: t[:, :0], "hidden_state has shape"),
        ("hidden_state", lambda t: t.double(), "hidden_state has dtype"),
        ("focal_weights", lambda t: t[1:], r"focal_weights \(packed by cpu_pack_focal\) has shape"),
        ("focal_weights", lambda t: t.flatten(1, 2), r"focal_weights \(packed by cpu_pack_focal\) has shape"),
        ("focal_sizes", lambda t: [], "focal_sizes has 0 values"),
        ("focal_sizes", lambda t: t[:5], "focal_sizes has 5 values"),
        ("focal_sizes", lambda t: t[:4], r"focal_weights \(packed by cpu_pack_focal\) has shape"),
        ("focal_sizes", lambda t: [3, 3, 5, 4, 7, 9], "focal_sizes has 5 x 4; expected odd"),
        ("focal_sizes", lambda t: [3, 3, 5, 5, -7, -7], "focal_sizes has -7 x -7; expected odd"),
        ("projection_in", lambda t: t[:2], "projection_in has shape"),
        ("projection_context", lambda t: t[:, 1:], "projection_context has shape"),
        ("projection_out", lambda t: t.bfloat16(), "projection_out has dtype"),
        ("projection_context_bias", lambda t: t[1:], "projection_context_bias has shape"),
        ("fc2", lambda t: t[0], r"fc2 has shape \(96\); expected \(C, hidden units\)"),
        ("fc1", lambda t: t[:, 1:], "fc1 has shape"),
        ("fc1", lambda t: t[:17], "fc1 has shape"),
        ("fc1", lambda t: OPS.cpu_pack_linear(t, None, None)[:2], r"fc1 \(packed by cpu_pack_linear\) has shape"),
        ("fc2", lambda t: t[:, :17], "fc1 has shape"),
        ("fc2", lambda t: OPS.cpu_pack_linear(t, None, None)[:, :1], "fc2 has shape"),
        ("norm1_bias", lambda t: t[1:], "norm1_bias has shape"),
        ("norm2_weight", lambda t: t[:3], "norm2_weight has shape"),
        ("modulation_norm_bias", lambda t: None, "modulation_norm_weight, .* expected all three"),
        ("modulation_norm_weight", lambda t: t[:3], "modulation_norm_weight has shape"),
        ("scale_2", lambda t: t[:3], "scale_2 has shape"),
    ],
)
def test_bad_arguments_are_named(name, change, message):
    arguments = [torch.randn(2, 6, 5, 24), *unpacked(make_layer(24, inner=True, scale=True))]
    at = NAMES.index(name)
    arguments[at] = change(arguments[at])
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_block(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"weight": torch.zeros(4, 3).double()}, "weight has dtype"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"scale": torch.zeros(3)}, "scale has shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments_of_packing_are_named(change, message):
    arguments = {"weight": torch.zeros(4, 3), "bias": None, "scale": None}
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_pack_linear(*(arguments | change).values())

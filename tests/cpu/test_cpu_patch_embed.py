"""Stem and downsampling as one operator in CPU inference, against the modules it stands for.

The rule is the project's: the error against float64 is at most twice that of the modules in float32, plus one unit in
the last place of the largest output.
"""

import copy
import re

import pytest
import torch
from instruction_sets import OPS, isa, product_isa, require, threads  # noqa: F401
from torch import nn

from focalnet import FocalNetConfig, use_backend
from focalnet.backends.registry import requested
from focalnet.fusion.cpu_inference import Precision, why_not_call
from focalnet.models.layers import FocalNetEmbeddings
from focalnet.models.patch_embeddings import FocalNetPatchEmbeddings, call

require("cpu_patch_embed")


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval().requires_grad_(False)


def downsampling(dim, conv_embed=False):
    return randomised(FocalNetPatchEmbeddings.downsampling(FocalNetConfig(use_conv_embed=conv_embed), dim))


def reason_or_call(module, x):
    return why_not_call(x) or call(module.patch_embeddings, module.norm, Precision.of(x), requested(None))


def stem(**fields):
    return randomised(FocalNetEmbeddings(FocalNetConfig(**fields)))


def check(module, x):
    with torch.no_grad():
        fused = module(x)
        with use_backend("reference"):
            by_modules = module(x)
            exact = copy.deepcopy(module).double()(x.double())
    assert fused.shape == exact.shape
    assert fused.is_contiguous()
    if fused.numel():
        ulp = torch.finfo(x.dtype).eps * exact.abs().max()
        allowed = 2 * (by_modules - exact).abs().max() + ulp
        assert (fused - exact).abs().max() <= allowed


@pytest.mark.parametrize("conv_embed", [False, True], ids=["2/2", "3/2"])
@pytest.mark.parametrize("dim", [5, 16, 96])
@pytest.mark.parametrize("shape", [(0, 4, 4), (40, 1, 1), (30, 2, 2), (3, 7, 5), (1, 24, 25), (1, 56, 56)], ids=str)
def test_downsampling(isa, shape, dim, conv_embed):
    check(downsampling(dim, conv_embed), torch.randn(*shape, dim))


def test_deep_downsampling(isa):
    """Several blocks of k, and weights split by columns."""
    check(downsampling(520), torch.randn(1, 14, 14, 520))


STEMS = [{}, {"use_conv_embed": True}, {"use_conv_embed": True, "stem_padding": 3}]
STEMS += [{"patch_size": 3, "embed_dim": 20}, {"patch_size": (2, 5), "num_channels": 1}]


@pytest.mark.parametrize("fields", STEMS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (29, 50), (7, 9), (100, 131)], ids=str)
def test_stem(isa, size, fields):
    module = stem(**fields)
    channels = fields.get("num_channels", 3)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check(module, torch.randn(2, channels, *size).contiguous(memory_format=memory_format))


@pytest.mark.parametrize("conv_embed", [False, True], ids=["2/2", "3/2"])
@pytest.mark.parametrize("shape", [(0, 4, 4, 16), (3, 7, 5, 5), (1, 24, 25, 96), (1, 6, 6, 520)], ids=str)
def test_downsampling_in_bfloat16(product_isa, shape, conv_embed):
    module, x = downsampling(shape[-1], conv_embed).bfloat16(), torch.randn(shape).bfloat16()
    with torch.no_grad():
        found = why_not_call(x) or call(module, module.norm, Precision.of(x), None, is_owner=True)
    assert not isinstance(found, str)
    check(module, x)


@pytest.mark.parametrize("fields", STEMS, ids=str)
def test_stem_in_bfloat16(product_isa, fields):
    x = torch.randn(2, fields.get("num_channels", 3), 29, 50).bfloat16()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check(stem(**fields).bfloat16(), x.contiguous(memory_format=memory_format))


def test_products_in_bfloat16_of_a_map_in_float32(product_isa):
    """As under autocast: what is read is rounded first."""
    module, x = downsampling(24), torch.randn(1, 10, 10, 24)
    weight, bias = module.projection.weight.bfloat16(), module.projection.bias
    options = [[2, 2], [0, 0], [5, 5], module.norm.weight, module.norm.bias, 1e-5]
    found = OPS.cpu_patch_embed(x, weight, bias, *options)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, OPS.cpu_patch_embed(x.bfloat16(), weight, bias, *options))


@pytest.mark.parametrize("kept", ["norm", "projection", "input"])
def test_mixed_dtypes_go_by_modules(kept):
    module, x = downsampling(16).bfloat16(), torch.randn(1, 6, 6, 16).bfloat16()
    x = x.float() if kept == "input" else x
    if kept != "input":
        getattr(module, kept).float()
    with torch.no_grad():
        assert isinstance((why_not_call(x) or call(module, module.norm, Precision.of(x), None, is_owner=True)), str)


def test_a_masked_stem():
    module = randomised(FocalNetEmbeddings(FocalNetConfig(), use_mask_token=True))
    images, mask = torch.randn(2, 3, 32, 32), torch.arange(128).view(2, 64) % 3 == 0
    with torch.no_grad():
        masked = module(images, mask).flatten(1, 2)
        assert torch.equal(masked[~mask], module(images).flatten(1, 2)[~mask])
    assert (masked[mask] == module.mask_token).all()


@pytest.mark.parametrize("shape", [(1, 14, 14, 384), (3, 40, 40, 24)], ids=str)
def test_bits_do_not_depend_on_threads_or_layout(shape):
    module, x = downsampling(shape[-1], conv_embed=True), torch.randn(shape)
    with torch.no_grad():
        expected = module(x)
        for n in (1, 2, 4):
            with threads(n):
                assert torch.equal(module(x), expected), n
                assert torch.equal(module(x[:1]), expected[:1]), n
        planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(module(planes), expected)
        wide = torch.randn(*shape[:3], shape[3] + 3)
        wide[..., : shape[3]] = x
        assert torch.equal(module(wide[..., : shape[3]]), expected)


def hooked(module):
    module.patch_embeddings.register_forward_hook(lambda *_: None)


def hooked_convolution(module):
    module.patch_embeddings.projection.register_forward_hook(lambda *_: None)


def dilated(module):
    module.patch_embeddings.projection.dilation = (2, 2)


def another_norm(module):
    module.norm = nn.Identity()


def in_double(module):
    module.double()


def with_an_adapter(module):
    module.patch_embeddings.projection = nn.Sequential(module.patch_embeddings.projection)


CASES = [(hooked, "hooked"), (hooked_convolution, "hooked"), (dilated, "dilated"), (with_an_adapter, "Sequential")]
CASES += [(another_norm, "the norm is Identity"), (in_double, "weight is Parameter, .* torch.float64")]


@pytest.mark.parametrize(("change", "expected"), CASES)
@pytest.mark.parametrize("used_before", [False, True], ids=["new", "used before"])
def test_what_the_operator_cannot_stand_for_goes_by_modules(change, expected, used_before):
    module, x = stem(), torch.randn(1, 8, 8, 3)
    with torch.no_grad():
        if used_before:
            assert not isinstance(reason_or_call(module, x), str)
        change(module)
        assert re.search(expected, reason_or_call(module, x))


@pytest.mark.parametrize("affine", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_norms_without_weight_or_bias(isa, affine):
    module = stem()
    module.norm = nn.LayerNorm(96, **affine)
    check(module, torch.randn(2, 3, 32, 32))


def test_weights_of_any_strides_give_the_same_bits(isa):
    module, x = downsampling(16), torch.randn(1, 6, 6, 16)
    with torch.no_grad():
        expected = module(x)
        module.to(memory_format=torch.channels_last)
        assert not module.projection.weight.is_contiguous()
        assert torch.equal(module(x), expected)


def in_place(module):
    module.projection.weight.mul_(1.5)


def by_replacing(module):
    module.norm = nn.LayerNorm(32)


def by_data(module):
    module.norm.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [in_place, by_replacing, by_data])
def test_weights_count_as_they_are(change):
    module, x = downsampling(16), torch.randn(1, 6, 6, 16)
    with torch.no_grad():
        before = module(x)
        change(module)
        after = module(x)
        with use_backend("reference"):
            torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


WEIGHT = torch.zeros(20, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 6, 3)}, r"input has shape \(2, 6, 3\)"),
        ({"input": torch.zeros(1, 6, 6, 3).double()}, "input has dtype"),
        ({"weight": WEIGHT[:, :1]}, r"weight has shape \(20, 1, 2, 2\); expected \(N, 3, kh, kw\)"),
        ({"weight": WEIGHT.flatten(1)}, "weight has shape"),
        ({"weight": WEIGHT.double()}, "weight has dtype"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"stride": [2]}, r"stride is \(2\); expected two values of at least 1"),
        ({"stride": [2, 0]}, "stride is"),
        ({"padding": [-1, 0]}, "padding is"),
        ({"output_size": [0, 3]}, "output_size is"),
        ({"norm_bias": torch.zeros(3)}, "norm_bias has shape"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight has shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "input": torch.zeros(1, 6, 6, 3),
        "weight": WEIGHT,
        "bias": torch.zeros(20),
        "stride": [2, 2],
        "padding": [0, 0],
        "output_size": [3, 3],
        "norm_weight": torch.zeros(20),
        "norm_bias": torch.zeros(20),
        "eps": 1e-5,
    }
    OPS.cpu_patch_embed(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_patch_embed(*(arguments | change).values())

"""CPU inference under autocast to bfloat16: operators run, and round the float32 weights as they read them.

Outputs have the dtypes of the modules under autocast. The error against float64 is at most twice theirs, plus one unit
in the last place of the largest value.
"""

import copy

import pytest
import torch
from block_layers import make_layer, weights
from golden import MODELS
from instruction_sets import OPS, product_isa, require  # noqa: F401
from small_models import EVERY_OPTION, SMALL, build, images, tensors, theirs
from sources import golden_model

import focalnet
from focalnet.backends import registry

require("cpu_linear")
OURS = {
    "defaults": lambda: build(focalnet, "FocalNetForImageClassification", SMALL),
    "every option": lambda: build(
        focalnet, "FocalNetForImageClassification", {**SMALL, **EVERY_OPTION, "hidden_act": "gelu"}
    ),
    "masked": lambda: build(focalnet, "FocalNetForMaskedImageModeling", SMALL),
    "backbone": lambda: build(focalnet, "FocalNetBackbone", SMALL),
}
PATCHED = {"transformers": theirs} | {name: lambda name=name: golden_model(name) for name in MODELS}


@pytest.fixture
def fused(monkeypatch):
    """One entry for every block that ran as one operator."""
    calls, operators = [], registry._REGISTRY["cpu"].operators
    operator = operators["block"]
    monkeypatch.setitem(operators, "block", lambda *arguments: calls.append(1) or operator(*arguments))
    return calls


def under_autocast(model, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return tensors(model(x))


def assert_within_rule(ours, modules, exact):
    for mine, plain, double in zip(ours, modules, exact, strict=True):
        assert mine.dtype == plain.dtype
        ulp = torch.finfo(torch.bfloat16).eps * double.abs().max()
        assert (mine.double() - double).abs().max() <= 2 * (plain.double() - double).abs().max() + ulp


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_own_models(make, fused):
    model, x = make().eval(), images(64, 96)
    ours = under_autocast(model, x)
    assert len(fused) == sum(model.config.depths)
    with focalnet.use_backend("reference"):
        modules = under_autocast(model, x)
    with torch.no_grad():
        exact = tensors(copy.deepcopy(model).double()(x.double()))
    assert len(fused) == sum(model.config.depths)
    assert_within_rule(ours, modules, exact)


@pytest.mark.parametrize("make", PATCHED.values(), ids=PATCHED)
def test_patched_models(make, fused):
    original, x = make().eval(), images(64, 96)
    patched = copy.deepcopy(original)
    focalnet.patch(patched)
    fused.clear()  # of the trials
    ours = under_autocast(patched, x)
    assert fused
    with torch.no_grad():
        exact = tensors(copy.deepcopy(original).double()(x.double()))
    assert_within_rule(ours, under_autocast(original, x), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 7, 17), (2, 9, 7, 96), (1, 6, 5, 300)], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": True}, {"post": True, "inner": True}], ids=str)
def test_weights_rounded_in_the_operator_are_those_rounded_before(product_isa, options, shape, dtype):
    """To the bit: matrices of one row or column too many for whole vectors, of odd K, in one block of k and in two."""
    layer, x = make_layer(shape[-1], **options), torch.randn(shape).to(dtype)
    arguments = list(weights(layer))[:-1]
    matrices = [
        [weight.bfloat16() for weight in argument]
        if isinstance(argument, list)
        else argument.bfloat16()
        if isinstance(argument, torch.Tensor) and argument.ndim > 1
        else argument
        for argument in arguments
    ]
    assert torch.equal(OPS.cpu_block(x, *arguments, True), OPS.cpu_block(x, *matrices, False))


@pytest.mark.parametrize("shape", [(2, 10, 10, 24), (1, 6, 6, 17)], ids=str)
def test_rounded_weights_of_patch_embeddings_and_linear_layers(product_isa, shape):
    channels, x = shape[-1], torch.randn(shape)
    weight, bias = torch.randn(40, channels, 2, 2), torch.randn(40)
    options = [[2, 2], [0, 0], [shape[1] // 2, shape[2] // 2], torch.ones(40), torch.zeros(40), 1e-5, False]
    rounded = OPS.cpu_patch_embed(x, weight, bias, *options, True)
    assert torch.equal(rounded, OPS.cpu_patch_embed(x, weight.bfloat16(), bias, *options, False))
    features, matrix = torch.randn(3, channels), torch.randn(33, channels)
    linear = OPS.cpu_linear(features, matrix, None, True)
    assert torch.equal(linear, OPS.cpu_linear(features, matrix.bfloat16(), None, False))


def test_float16_and_float64_go_by_modules(fused):
    model, x = OURS["defaults"]().eval(), images(64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model(x).logits.dtype == torch.float16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.double()(x.double()).logits.dtype == torch.float64
    assert not fused

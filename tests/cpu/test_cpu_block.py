"""The C++ operator focalnet::cpu_block against the block of modules it stands for, FocalNetLayer in evaluation.

The rule is the project's: the error against float64 is at most twice that of the reference in float32, plus one unit
in the last place of the largest output magnitude.
"""

import functools
import math

import pytest
import torch
from block_layers import FLAGS, argument_names, make_layer, weights
from instruction_sets import OPS, isa, require, threads  # noqa: F401
from rule import ulp

require("cpu_block")

ENOUGH = 2000  # numbers of which the largest error is compared


@functools.cache
def expected(shape, options):
    """The layer's weights, inputs, their results in float64 and the error that is allowed: the same for every
    instruction set. The largest error of a few numbers is chance, so maps of a few have more than one input."""
    layer = make_layer(shape[-1], **dict(options))
    double = make_layer(shape[-1], **dict(options), dtype=torch.float64)
    size = math.prod(shape)
    inputs = torch.randn(1 + ENOUGH // size if size else 1, *shape)
    exact = torch.stack([double(one) for one in inputs.double()])
    low = torch.stack([layer(one) for one in inputs])
    return weights(layer), inputs, exact, 2 * largest(low - exact) + ulp(exact, torch.float32)


def largest(errors):
    return errors.abs().max().item() if errors.numel() else 0.0


def check(shape, **options):
    arguments, inputs, exact, allowed = expected(shape, tuple(options.items()))
    results = [OPS.cpu_block(one, *arguments) for one in inputs]
    assert all(ours.shape == shape and ours.is_contiguous() for ours in results)
    error = largest(torch.stack(results).double() - exact)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


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


@pytest.mark.slow
def test_large_map(isa):
    """Many blocks of tokens, and images in more than one group."""
    check((5, 90, 61, 64), scale=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"post": True, "inner": True, "scale": True}], ids=["pre", "post"])
@pytest.mark.parametrize(
    "shape",
    [(1, 7, 7, 768), (1, 23, 23, 520), (3, 14, 14, 96), (1, 14, 14, 320), (2, 5, 7, 17), (2, 90, 60, 48)],
    ids=str,
)
def test_bits_do_not_depend_on_threads(isa, shape, options):
    """Nor on the way chosen, by tokens or by columns, or on the images beside: the numbers of threads change both."""
    arguments = weights(make_layer(shape[-1], **options))
    hidden_state = torch.randn(shape)
    expected = OPS.cpu_block(hidden_state, *arguments)
    for n in (1, 2, 4):
        with threads(n):
            assert torch.equal(OPS.cpu_block(hidden_state, *arguments), expected), n
            assert torch.equal(OPS.cpu_block(hidden_state[:1], *arguments), expected[:1]), n


def test_strided_input_gives_the_same_bits():
    arguments = weights(make_layer(24))
    hidden_state = torch.randn(2, 24, 6, 5).permute(0, 2, 3, 1)
    assert torch.equal(OPS.cpu_block(hidden_state, *arguments), OPS.cpu_block(hidden_state.contiguous(), *arguments))


def test_the_input_is_left_alone():
    arguments = weights(make_layer(24, post=True))
    hidden_state = torch.randn(2, 6, 5, 24)
    before = hidden_state.clone()
    OPS.cpu_block(hidden_state, *arguments)
    assert torch.equal(hidden_state, before)


@pytest.mark.parametrize("dim", [17, 96, 300])
def test_norms_without_weight_or_bias(isa, dim):
    """elementwise_affine=False and bias=False, with and without a layer scale that the norm takes up."""
    for scale in (False, True):
        for post in (False, True):
            layer, double = (make_layer(dim, post=post, scale=scale, dtype=d) for d in (torch.float32, torch.float64))
            for block in (layer, double):
                for name in ("weight", "bias"):
                    block.norm1.register_parameter(name, None)
                block.norm2.register_parameter("bias", None)
            hidden_state = torch.randn(2, 5, 7, dim)
            exact = double(hidden_state.double())
            allowed = 2 * (layer(hidden_state).double() - exact).abs().max().item() + ulp(exact, torch.float32)
            assert (OPS.cpu_block(hidden_state, *weights(layer)) - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("shape", [(1, 7, 7, 300), (3, 14, 14, 96)], ids=["by columns", "by blocks"])
def test_parameters_of_any_strides_give_the_same_bits(isa, shape):
    """Transposed, with gaps, and convolutions in channels-last memory format."""
    layer, hidden_state = make_layer(shape[-1], scale=True), torch.randn(shape)
    expected = OPS.cpu_block(hidden_state, *weights(layer))
    layer.to(memory_format=torch.channels_last)
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
        elif parameter.ndim == 1:
            parameter.data = parameter.data.repeat_interleave(3)[::3]
    assert not layer.mlp.fc1.weight.is_contiguous()
    assert torch.equal(OPS.cpu_block(hidden_state, *weights(layer)), expected)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hidden_state", lambda t: t[0], r"hidden_state has shape \(6, 5, 24\); expected \(B, H, W, C\)"),
        ("hidden_state", lambda t: t[..., :20], r"projection_in has shape \(52, 24\); expected \(44, 20\)"),
        ("hidden_state", lambda t: t[:, :0], "hidden_state has shape"),
        ("hidden_state", lambda t: t.double(), "hidden_state has dtype"),
        ("focal_weights", lambda t: [], "focal_weights is empty"),
        ("focal_weights", lambda t: t[1:], r"projection_in has shape \(52, 24\); expected \(51, 24\)"),
        ("focal_weights", lambda t: [t[0], t[1][:20], t[2]], r"focal_weights\[1\] has shape \(20, 1, 5, 5\)"),
        ("focal_weights", lambda t: [t[0], t[1], t[2][..., :4]], r"focal_weights\[2\] .* odd kh and kw"),
        ("focal_weights", lambda t: [t[0].double(), *t[1:]], r"focal_weights\[0\] has dtype"),
        ("projection_in", lambda t: t[:2], "projection_in has shape"),
        ("projection_context", lambda t: t[:, 1:], "projection_context has shape"),
        ("projection_out", lambda t: t.bfloat16(), "projection_out has dtype"),
        ("projection_context_bias", lambda t: t[1:], "projection_context_bias has shape"),
        ("fc2", lambda t: t[0], r"fc2 has shape \(96\); expected \(C, hidden units\)"),
        ("fc1", lambda t: t[:, 1:], "fc1 has shape"),
        ("fc1", lambda t: t[:17], "fc1 has shape"),
        ("fc2", lambda t: t[:, :17], "fc1 has shape"),
        ("norm1_bias", lambda t: t[1:], "norm1_bias has shape"),
        ("norm2_weight", lambda t: t[:3], "norm2_weight has shape"),
        ("modulation_norm_weight", lambda t: t[:3], "modulation_norm_weight has shape"),
        ("gamma_2", lambda t: t[:3], "gamma_2 has shape"),
    ],
)
def test_bad_arguments_are_named(name, change, message):
    arguments = [torch.randn(2, 6, 5, 24), *weights(make_layer(24, inner=True, scale=True))]
    at = argument_names().index(name)
    arguments[at] = change(arguments[at])
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_block(*arguments)

"""The C++ operator focalnet::cpu_block with weights of bfloat16, against the block of modules in bfloat16.

The rule is the project's: the error against float64 is at most twice that of the modules in the same precision, plus
one unit in the last place of the largest output magnitude. Weights are rounded before they are compared, so that the
error is that of the arithmetic.
"""

import functools

import pytest
import torch
from block_layers import FLAGS, argument_names, make_layer, weights
from instruction_sets import EMULATED_ISAS, OPS, product_isa, require, threads  # noqa: F401
from rule import assert_within_rule

require("cpu_block")


@functools.cache
def expected(shape, options):
    """The arguments, and the results in bfloat16 and in float64: the same for every instruction set."""
    layer = make_layer(shape[-1], **dict(options), dtype=torch.bfloat16)
    double = make_layer(shape[-1], **dict(options), dtype=torch.bfloat16).double()
    hidden_state = torch.randn(shape).bfloat16()
    return [hidden_state, *weights(layer)], layer(hidden_state), double(hidden_state.double())


def check(shape, **options):
    arguments, low, exact = expected(shape, tuple(options.items()))
    ours = OPS.cpu_block(*arguments)
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous()
    assert_within_rule("block", ours, low, exact)


@pytest.mark.parametrize("dim", [17, 96])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(k for k, v in f.items() if v) or "none")
def test_every_combination_of_flags(product_isa, flags, dim):
    check((2, 5, 7, dim), **flags)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("shape", [(0, 5, 7, 17), (3, 1, 1, 8), (1, 14, 14, 100), (3, 5, 7, 96)], ids=str)
def test_every_shape(product_isa, shape, post):
    check(shape, post=post, scale=True)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_number_of_levels(product_isa, levels):
    check((3, 9, 8, 24), levels=levels, window=5, normalize=True)


@pytest.mark.parametrize("dim, ratio", [(1, 1.0), (1, 4.0), (3, 0.4), (15, 1.5), (16, 4.0), (33, 9.0), (300, 5.2)])
def test_odd_widths(product_isa, dim, ratio):
    for post in (False, True):
        check((4, 6, 5, dim), mlp_ratio=ratio, post=post)


@pytest.mark.parametrize("tokens", range(1, 28))
def test_every_number_of_tokens(product_isa, tokens):
    check((1, tokens, 1, 32), levels=1, seed=tokens)


def test_products_longer_than_a_block_of_k(product_isa):
    """Their sums wait in float32 for the next block, whatever they are rounded to, a group of rows after the other."""
    check((1, 5, 11, 1100), levels=1, mlp_ratio=0.1, inner=True)


def test_large_map(product_isa):
    """Many blocks of tokens, and images in more than one group."""
    # Emulated products take their time.
    check((2, 40, 31, 16) if product_isa in EMULATED_ISAS else (5, 90, 61, 64), scale=True)


@pytest.mark.parametrize("options", [{}, {"post": True, "inner": True, "scale": True}], ids=["pre", "post"])
@pytest.mark.parametrize("shape", [(1, 7, 7, 300), (3, 14, 14, 40), (2, 5, 7, 17)], ids=str)
def test_bits_do_not_depend_on_threads(product_isa, shape, options):
    """Nor on the way chosen, by tokens or by columns, or on the images beside: the numbers of threads change both."""
    arguments = weights(make_layer(shape[-1], **options, dtype=torch.bfloat16))
    hidden_state = torch.randn(shape).bfloat16()
    expected = OPS.cpu_block(hidden_state, *arguments)
    for n in (1, 2, 4):
        with threads(n):
            assert torch.equal(OPS.cpu_block(hidden_state, *arguments), expected), n
            assert torch.equal(OPS.cpu_block(hidden_state[:1], *arguments), expected[:1]), n


@pytest.mark.parametrize("shape", [(1, 7, 7, 300), (3, 14, 14, 96), (2, 5, 7, 17)], ids=str)
def test_weights_at_any_address_give_the_same_bits(product_isa, shape):
    """Behind an odd number of elements, as in one flat buffer of all parameters, and of any strides."""
    layer, hidden_state = make_layer(shape[-1], post=True, dtype=torch.bfloat16), torch.randn(shape).bfloat16()
    expected = OPS.cpu_block(hidden_state, *weights(layer))
    for parameter in layer.parameters():
        flat = torch.empty(parameter.numel() + 1, dtype=torch.bfloat16)[1:]
        parameter.data = flat.copy_(parameter.flatten()).view(parameter.shape)
    shifted = torch.empty(hidden_state.numel() + 1, dtype=torch.bfloat16)[1:].view(shape).copy_(hidden_state)
    assert torch.equal(OPS.cpu_block(shifted, *weights(layer)), expected)
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    assert torch.equal(OPS.cpu_block(hidden_state, *weights(layer)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"scale": True}, {"post": True, "inner": True}], ids=str)
def test_what_autocast_computes(product_isa, options, dtype):
    """Matrices of bfloat16; maps, biases, norms and scales of float32."""
    layer, double = make_layer(96, **options), make_layer(96, **options).double()
    hidden_state = torch.randn(2, 9, 7, 96).to(dtype)
    arguments = list(weights(layer))
    for at, argument in enumerate(arguments):
        if isinstance(argument, list):
            arguments[at] = [weight.bfloat16() for weight in argument]
        elif isinstance(argument, torch.Tensor) and argument.ndim > 1:
            arguments[at] = argument.bfloat16()
    ours = OPS.cpu_block(hidden_state, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        modules = layer(hidden_state)
    assert ours.dtype == modules.dtype
    assert_within_rule("block", ours, modules, double(hidden_state.double()))


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_what_is_not_finite_stays_in_its_image(product_isa, value):
    arguments = weights(make_layer(17, dtype=torch.bfloat16))
    hidden_state = torch.randn(2, 5, 7, 17).bfloat16()
    expected = OPS.cpu_block(hidden_state, *arguments)
    hidden_state[0, 2, 3, 4] = value
    found = OPS.cpu_block(hidden_state, *arguments)
    assert torch.equal(found[1], expected[1])
    assert not torch.isfinite(found[0, 2, 3]).all()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hidden_state", lambda t: t.half(), "hidden_state has dtype Half; expected float32 or bfloat16"),
        ("projection_in", lambda t: t.float(), "hidden_state has dtype bfloat16 and the weights float32"),
        ("projection_in", lambda t: t.half(), "projection_in has dtype Half; expected float32 or bfloat16"),
        (
            "focal_weights",
            lambda t: [t[0], t[1].float(), t[2]],
            r"focal_weights\[1\] has dtype Float; expected .*BFloat",
        ),
        ("fc1", lambda t: t.float(), "fc1 has dtype Float; expected that of the other weights, BFloat16"),
        ("norm1_weight", lambda t: t.half(), "norm1_weight has dtype Half; expected float32 or bfloat16"),
        ("fc2_bias", lambda t: t.double(), "fc2_bias has dtype Double; expected float32 or bfloat16"),
    ],
)
def test_bad_dtypes_are_named(name, change, message):
    arguments = [torch.randn(2, 6, 5, 24).bfloat16(), *weights(make_layer(24, dtype=torch.bfloat16))]
    at = argument_names().index(name)
    arguments[at] = change(arguments[at])
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_block(*arguments)

"""The C++ operators focalnet::cpu_gated_aggregation and its backward, against a float64 reference.

The rule is the project's: the error against float64 is at most twice that of the plain PyTorch reference run in the
same precision, plus one unit in the last place of the largest output magnitude.
"""

import functools
import math

import pytest
import torch
from instruction_sets import OPS, isa, require, threads  # noqa: F401
from rule import assert_within_rule
from torch.nn import functional as F

from focalnet.reference import gated_aggregation as reference

require("cpu_gated_aggregation")

DTYPES = [torch.float32, torch.bfloat16]


def make(shape, kernels, dtype=torch.float32, packed=True, seed=0):
    """ctx, gates, weights, dagg; ctx and gates are views into one packed projection, as the module has them."""
    b, h, w, c = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    n = len(kernels)
    projection = normal(b, h, w, 2 * c + n + 1).to(dtype)
    ctx, gates = projection[..., c : 2 * c], projection[..., 2 * c :]
    if not packed:
        ctx, gates = ctx.contiguous(), gates.contiguous()
    sizes = [k if isinstance(k, tuple) else (k, k) for k in kernels]
    weights = [(normal(c, 1, kh, kw) * 1.5 / math.sqrt(kh * kw)).to(dtype) for kh, kw in sizes]
    return ctx, gates, weights, normal(b, h, w, c).to(dtype)


def gradients(ctx, gates, weights, dagg, normalize, dtype):
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (ctx, gates, *weights)]
    agg = reference(leaves[0], leaves[1], leaves[2:], normalize_modulator=normalize)
    return agg.detach(), torch.autograd.grad(agg, leaves, dagg.to(dtype))


@functools.cache
def expected(shape, kernels, dtype, normalize, packed, seed):
    """Operands, and agg and gradients in float64 and in ``dtype``: the same for every instruction set."""
    ctx, gates, weights, dagg = operands = make(shape, kernels, dtype, packed, seed)
    return operands, *(gradients(ctx, gates, weights, dagg, normalize, kind) for kind in (torch.float64, dtype))


def check(shape, kernels, dtype, normalize=False, packed=True, seed=0):
    operands, (exact_agg, exact), (low_agg, low) = expected(shape, kernels, dtype, normalize, packed, seed)
    ctx, gates, weights, dagg = operands
    agg = OPS.cpu_gated_aggregation(ctx, gates, weights, normalize)
    assert agg.is_contiguous()
    assert_within_rule("agg", agg, low_agg, exact_agg)
    agg_too, passed = OPS.cpu_gated_aggregation_and_sums(ctx, gates, weights, normalize)
    assert torch.equal(agg_too, agg)
    names = ["dctx", "dgates"] + [f"dfocal_weights[{i}]" for i in range(len(weights))]
    for sums in (None, passed):
        ours = OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, normalize, [True] * 3, sums)
        for name, a, b, c in zip(names, ours, low, exact, strict=True):
            assert_within_rule(f"{name} with sums {'found' if sums is None else 'passed'}", a, b, c)


# Where a map is small the batch is not: the rule compares two largest errors, and of a few numbers they are chance.
SHAPES = [
    ((2, 14, 14, 96), (3, 5, 7)),
    ((3, 9, 13, 17), (3, 5)),
    ((1, 1, 1, 1), (3,)),
    ((3, 1, 1, 8), (3, 5, 7)),
    ((2, 1, 19, 3), (5, 7)),
    ((2, 23, 1, 3), (3, 5, 7, 9)),
    ((1, 12, 10, 100), (5, 7, 9)),
    ((2, 30, 26, 8), (9, 11, 13)),
    ((1, 20, 33, 17), (11, 13, 15)),
    ((8, 5, 4, 8), (11, 13, 15)),
    ((4, 7, 7, 40), (3, 5, 7)),
    ((4, 8, 11, 8), ((3, 5), (7, 1), (1, 9))),
    ((9, 6, 7, 3), (1, 17)),
    ((0, 8, 8, 8), (3, 5)),
    ((1, 56, 57, 16), (3, 5, 7)),
    ((1, 90, 3, 8), (3, 5, 7)),
]

# Maps whose backward keeps no whole planes: rows in rings, heights that are no multiple of a step, kernels higher than
# a step or than the map; from the fourth on wide ones, in bands of columns, the last narrower than the others.
IN_RINGS = [
    ((1, 71, 67, 12), (3, 5, 7)),
    ((1, 301, 91, 8), (3,)),
    ((1, 61, 83, 5), (3, 5, 7, 9)),
    ((1, 37, 301, 9), (11, 13, 15)),
    ((1, 9, 701, 8), (3, 5, 7)),
    ((2, 45, 403, 17), ((3, 5), (7, 1), (1, 9))),
    ((1, 3, 1501, 8), (15,)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, kernels", SHAPES + IN_RINGS, ids=str)
def test_matches_reference(isa, shape, kernels, dtype):
    check(shape, kernels, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_normalized_and_contiguous(isa, dtype, packed, normalize):
    check((2, 10, 12, 24), (3, 5), dtype, normalize=normalize, packed=packed)


@pytest.mark.parametrize("width", range(1, 26))
def test_every_width(isa, width):
    check((4, 5, width, 24), (3, 5, 7), torch.float32, seed=width)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11, 13, 15, 17, 21])
@pytest.mark.parametrize("size", [(16, 15), (4, 5)])
def test_every_kernel(isa, kernel, size):
    check((4, *size, 41), (kernel, kernel), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    """Maps with transposed rows, gaps, an expanded batch or a channel stride other than 1 give the same bits."""
    ctx, gates, weights, dagg = make((2, 9, 11, 24), (3, 5), dtype)

    def same(ctx, gates, dagg):
        contiguous = [t.contiguous() for t in (ctx, gates, dagg)]
        a = OPS.cpu_gated_aggregation(ctx, gates, weights, True)
        b = OPS.cpu_gated_aggregation(*contiguous[:2], weights, True)
        assert torch.equal(a, b)
        a = OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, True, [True] * 3)
        b = OPS.cpu_gated_aggregation_bwd(contiguous[2], *contiguous[:2], weights, True, [True] * 3)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    same(ctx, gates, dagg)
    same(ctx.transpose(1, 2), gates.transpose(1, 2), dagg.transpose(1, 2))
    same(ctx[:, ::2, 1::3], gates[:, ::2, 1::3], dagg[:, ::2, 1::3])
    same(ctx[:1].expand(3, -1, -1, -1), gates[:1].expand(3, -1, -1, -1), dagg[:1].expand(3, -1, -1, -1))
    channels_first = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (ctx, gates, dagg)]
    same(*channels_first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, kernels",
    [
        ((1, 14, 14, 96), (3, 5, 7)),
        ((1, 40, 30, 8), (3, 5, 7)),
        ((3, 7, 7, 17), (5, 7)),
        ((1, 64, 64, 3), (3, 5)),
        ((2, 71, 67, 40), (3, 5, 7)),
        ((2, 23, 403, 40), (3, 5, 7)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_threads(isa, shape, kernels, dtype):
    ctx, gates, weights, dagg = make(shape, kernels, dtype)
    results = []
    for n in (1, 2, 4):
        with threads(n):
            agg, sums = OPS.cpu_gated_aggregation_and_sums(ctx, gates, weights, False)
            results.append([agg, sums])
            for known in (None, sums):
                results[-1] += OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, False, [True] * 3, known)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mask", [[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)], ids=str)
@pytest.mark.parametrize("sums_known", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 10, 20), (1, 71, 67, 12), (1, 9, 701, 12)], ids=["whole", "rings", "bands"])
def test_output_mask(isa, shape, sums_known, mask):
    ctx, gates, weights, dagg = make(shape, (3, 5, 7))
    sums = OPS.cpu_gated_aggregation_and_sums(ctx, gates, weights, False)[1] if sums_known else None
    every = OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, False, [True] * 3, sums)
    some = OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, False, mask, sums)
    assert len(some) == len(every)
    for i, (a, b) in enumerate(zip(some, every, strict=True)):
        if mask[min(i, 2)]:
            assert torch.equal(a, b)
        else:
            assert a.shape == (0,)


def test_gelu_over_its_whole_range(isa):
    """A 1x1 kernel of ones and a gate of one make the operator GELU itself."""
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.tensor([1e4, -1e4, 1e30, -1e30, 0.0, -0.0, 1e-30, -1e-30])])
    ctx = x.view(1, 1, -1, 1)
    gates = torch.tensor([1.0, 0.0]).expand(1, 1, x.numel(), 2)
    weights = [torch.ones(1, 1, 1, 1)]
    ones = torch.ones_like(ctx)
    exact = F.gelu(x.double())
    agg = OPS.cpu_gated_aggregation(ctx, gates, weights, False).flatten()
    ours, eager = (agg.double() - exact).abs(), (F.gelu(x).double() - exact).abs()
    scale = exact.abs().clamp_min(0.25)
    assert (ours / scale).max() <= (eager / scale).max()
    assert ours.max() <= eager.max()
    leaf = x.double().requires_grad_()
    (exact_grad,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    dctx = OPS.cpu_gated_aggregation_bwd(ones, ctx, gates, weights, False, [True, False, False])[0].flatten()
    assert (dctx.double() - exact_grad).abs().max() <= 4e-7


def test_nan_and_infinity_reach_the_output(isa):
    ctx, gates, weights, _ = make((1, 6, 6, 8), (3,))
    ctx = ctx.clone()
    ctx[0, 3, 3, 5] = float("nan")
    agg = OPS.cpu_gated_aggregation(ctx, gates, weights, False)
    assert agg[..., 5].isnan().any()
    assert not agg[..., :5].isnan().any()


def test_nan_reaches_the_gradients_that_it_reaches_in_the_reference(isa):
    """GELU's range is clamped. A comparison with NaN must not clamp NaN too."""
    ctx, gates, weights, dagg = make((2, 6, 6, 8), (3,))
    ctx = ctx.clone()
    ctx[0, 3, 3, 5] = float("nan")
    ours = OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, False, [True] * 3)
    _, expected = gradients(ctx, gates, weights, dagg, False, torch.float64)
    for name, mine, exact in zip(("dctx", "dgates", "dweight"), ours, expected, strict=True):
        assert exact.isnan().any(), name
        assert torch.equal(mine.isnan(), exact.isnan()), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(gates=a["gates"][..., :2]), "gates has shape"),
        (lambda a: a.update(gates=a["gates"].double()), "gates has dtype"),
        (lambda a: a.update(gates=a["gates"][:, :3]), "gates has shape"),
        (lambda a: a.update(ctx=a["ctx"][0]), "ctx has shape"),
        (lambda a: a.update(ctx=a["ctx"].double()), "ctx has dtype"),
        (lambda a: a.update(weights=[]), "focal_weights is empty"),
        (lambda a: a.update(weights=[a["weights"][0], a["weights"][1][:4]]), r"focal_weights\[1\] has shape"),
        (lambda a: a.update(weights=[a["weights"][0], a["weights"][1][:, :, :4]]), r"focal_weights\[1\] has shape"),
        (lambda a: a.update(weights=[a["weights"][0].bfloat16(), a["weights"][1]]), r"focal_weights\[0\] has dtype"),
    ],
)
def test_bad_arguments_are_named(change, message):
    ctx, gates, weights, _ = make((1, 6, 6, 8), (3, 5))
    arguments = {"ctx": ctx, "gates": gates, "weights": weights}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_gated_aggregation(arguments["ctx"], arguments["gates"], arguments["weights"], False)


@pytest.mark.parametrize(
    "sums", [torch.zeros(8), torch.zeros(2, 8), torch.zeros(1, 8).double(), torch.zeros(8, 1).T[:, ::2]]
)
def test_bad_sums_are_named(sums):
    ctx, gates, weights, dagg = make((1, 6, 6, 8), (3, 5))
    with pytest.raises(RuntimeError, match=r"sums is no contiguous float32 matrix of shape \(1, 8\)"):
        OPS.cpu_gated_aggregation_bwd(dagg, ctx, gates, weights, False, [True] * 3, sums)


def test_unknown_isa_is_refused():
    with pytest.raises(RuntimeError, match="isa"):
        OPS.cpu_set_isa("sse9")

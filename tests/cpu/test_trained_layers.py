"""The C++ operators of linear layers and MLPs in training, forward and backward, against float64.

The rule is the project's: at most twice the error of PyTorch's layers in the same dtype, and one unit in the last
place of the largest output.
"""

import pytest
import torch
from instruction_sets import OPS, product_isa, require, threads  # noqa: F401
from rule import assert_within_rule
from torch.nn import functional as F

from focalnet.backends import cpu
from focalnet.backends.registry import optional

require("cpu_mlp_fwd")

DTYPES = [torch.float32, torch.bfloat16]
# Rows, and the widths of the layers: single elements, partial panels and tiles, several packed blocks of tokens, and
# few rows of many channels, which are split by columns.
LINEARS = [(0, 5, 3), (1, 1, 1), (3, 7, 5), (64, 17, 31), (100, 33, 20), (300, 100, 64), (600, 96, 196), (40, 64, 512)]
# The last but one has several chunks in backward.
MLPS = [(0, 16, 16, 16), (1, 16, 16, 16), (5, 16, 64, 16), (67, 32, 48, 80), (300, 48, 192, 32), (20, 64, 512, 64)]
CHUNKS = (2600, 16, 512, 16)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, product_isa):
    if request.param == torch.bfloat16 and not cpu.has_dot_products():
        pytest.skip(f"{product_isa} has no products of bfloat16")
    return request.param


def normal(*size, dtype, scale=1.0):
    return (scale * torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))).to(dtype)


def linear_operands(rows, k, n, dtype):
    """x, weight, bias, dy"""
    return (
        normal(rows, k, dtype=dtype),
        normal(n, k, dtype=dtype, scale=k**-0.5),
        normal(n, dtype=dtype),
        normal(rows, n, dtype=dtype),
    )


def mlp_operands(rows, channels, hidden, out, dtype):
    """x, weight1, bias1, weight2, bias2, dy"""
    return (
        *linear_operands(rows, channels, hidden, dtype)[:3],
        normal(out, hidden, dtype=dtype, scale=hidden**-0.5),
        normal(out, dtype=dtype),
        normal(rows, out, dtype=dtype),
    )


def mlp(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def expected(layer, operands, dtype):
    *inputs, dy = [t.detach().to(dtype) for t in operands]
    leaves = [t.requires_grad_() for t in inputs]
    out = layer(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def assert_rule(names, ours, layer, operands):
    low, exact = expected(layer, operands, operands[0].dtype), expected(layer, operands, torch.float64)
    for name, *values in zip(names, ours, low, exact, strict=True):
        assert_within_rule(name, *values)


@pytest.mark.parametrize("size", LINEARS, ids=str)
def test_linear_layer(dtype, size):
    x, weight, bias, dy = operands = linear_operands(*size, dtype)
    ours = [OPS.cpu_linear_fwd(x, weight, bias), *OPS.cpu_linear_bwd(dy, x, weight, True, True)]
    assert_rule(("y", "dx", "dweight", "dbias"), ours, F.linear, operands)


def run_mlp(operands):
    x, weight1, bias1, weight2, bias2, dy = operands
    y, fc1 = OPS.cpu_mlp_fwd(x, weight1, bias1, weight2, bias2)
    return [y, *OPS.cpu_mlp_bwd(dy, x, fc1, weight1, weight2, True, True, True)]


@pytest.mark.parametrize("size", [*MLPS, CHUNKS], ids=str)
def test_mlp(dtype, size):
    operands = mlp_operands(*size, dtype)
    names = ("y", "dx", "dweight1", "dbias1", "dweight2", "dbias2")
    assert_rule(names, run_mlp(operands), mlp, operands)


def test_product_times_a_factor_that_is_a_view(dtype):
    """q is a part of the packed projection: its rows have any pitch."""
    x, weight, bias, _ = linear_operands(50, 24, 32, dtype)
    factor = normal(50, 71, dtype=dtype)[:, 5:37]
    ours = OPS.cpu_linear_fwd(x, weight, bias, factor)
    low, exact = (F.linear(*(t.to(d) for t in (x, weight, bias))) * factor.to(d) for d in (dtype, torch.float64))
    assert_within_rule("product", ours, low, exact)


def test_bits_do_not_depend_on_threads(dtype):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            linear = linear_operands(600, 96, 196, dtype)
            made = OPS.cpu_linear_bwd(linear[3], *linear[:2], True, True)
            results.append([*run_mlp(mlp_operands(*CHUNKS, dtype)), *made])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_gradients_that_are_asked_for():
    x, weight1, bias1, weight2, bias2, dy = mlp_operands(20, 16, 32, 48, torch.float32)
    _, fc1 = OPS.cpu_mlp_fwd(x, weight1, bias1, weight2, bias2)
    every = OPS.cpu_mlp_bwd(dy, x, fc1, weight1, weight2, True, True, True)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        need_x, need_first, need_second = wanted
        made = OPS.cpu_mlp_bwd(dy, x, fc1, weight1, weight2, *wanted)
        mask = (need_x, need_first, need_first, need_second, need_second)
        for gradient, whole, want in zip(made, every, mask, strict=True):
            assert torch.equal(gradient, whole) if want else gradient.numel() == 0


def test_nan_reaches_the_rows_that_it_concerns(dtype):
    x, weight1, bias1, weight2, bias2, dy = mlp_operands(20, 16, 32, 16, dtype)
    x[7, 3] = float("nan")
    y, _, dweight1, *_ = run_mlp((x, weight1, bias1, weight2, bias2, dy))
    assert y[7].isnan().all()
    assert not y[torch.arange(20) != 7].isnan().any()
    assert dweight1.isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(x=a["x"].double()), "x has dtype Double; expected float32 or bfloat16"),
        (lambda a: a.update(x=a["x"][0]), "x has 1 dimensions; expected 2"),
        (lambda a: a.update(weight=a["weight"][:, :5]), r"x has shape \(4, 6\); expected \(4, 5\)"),
        (lambda a: a.update(weight=a["weight"].bfloat16()), "weight has dtype BFloat16; expected that of the other"),
        (lambda a: a.update(bias=a["bias"][:5]), r"bias has shape \(5\); expected \(16\)"),
        (lambda a: a.update(factor=torch.zeros(4, 15)), r"factor has shape \(4, 15\); expected \(4, 16\)"),
        (lambda a: a.update(factor=torch.zeros(16, 4).T), "factor has 16 columns of stride 4; expected"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(4, 6), "weight": torch.zeros(16, 6), "bias": torch.zeros(16), "factor": None}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_linear_fwd(*arguments.values())


def test_widths_that_are_no_whole_panels_are_refused():
    with pytest.raises(RuntimeError, match="the MLP is 16 -> 30 -> 16 units wide; expected positive multiples of 16"):
        OPS.cpu_mlp_fwd(torch.zeros(2, 16), torch.zeros(30, 16), None, torch.zeros(16, 30), None)
    reason = optional("mlp_fwd", torch.zeros(64, 16), None, widths=(30, 16))
    assert "the layers are 16 x 30 x 16 wide, not all multiples of 16" in reason


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)], ids=str)
def test_layers_without_columns_are_refused(shape):
    weight = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"weight has shape \({shape[0]}, {shape[1]}\); expected \(N, K\), of at"):
        OPS.cpu_linear_fwd(torch.zeros(200, shape[1]), weight, None)
    with pytest.raises(RuntimeError, match="units wide; expected positive multiples of 16"):
        OPS.cpu_mlp_fwd(torch.zeros(200, shape[1]), weight, None, weight.T.contiguous(), None)


def test_few_rows_go_to_pytorch():
    assert "63 rows are fewer than 64" in optional("linear_fwd", torch.zeros(63, 16), None)
    assert not isinstance(optional("linear_fwd", torch.zeros(64, 16), None), str)


def test_bfloat16_without_dot_products_goes_to_pytorch(product_isa):
    rows = torch.zeros(64, 16, dtype=torch.bfloat16)
    if cpu.has_dot_products():
        pytest.skip(f"{product_isa} has them")
    assert "no dot products of bfloat16" in optional("linear_fwd", rows, None)
    with pytest.raises(RuntimeError, match="this processor has no dot products of it"):
        OPS.cpu_linear_fwd(rows, torch.zeros(16, 16, dtype=torch.bfloat16), None)

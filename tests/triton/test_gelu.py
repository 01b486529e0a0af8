"""GELU and its derivative on every value that counts, against float64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from focalnet.kernels.tiles import gelu, gelu_and_grad
from rule import assert_within_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


@triton.jit
def gelu_kernel(x, value, value_again, slope, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(value + at, gelu(z, DTYPE), mask=at < n)
    again, grad = gelu_and_grad(z, DTYPE)
    tl.store(value_again + at, again, mask=at < n)
    tl.store(slope + at, grad, mask=at < n)


def gelus(z, dtype):
    """GELU by both functions, and GELU', as the kernels form them in float32 for a result of ``dtype``."""
    z = z.float().to(DEVICE)
    made = [torch.empty_like(z) for _ in range(3)]
    gelu_kernel[(triton.cdiv(len(z), 4096),)](z, *made, len(z), TYPES[dtype], 4096)
    return [one.cpu() for one in made]


def every(dtype):
    """Every bfloat16 in -10 .. 10, or as many values of the other types as there are of those."""
    if dtype == torch.float32:
        return torch.linspace(-10, 10, 40001)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.float().abs() <= 10]


def exact(z):
    z = z.double()
    phi = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    return z * phi, phi + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


@each_dtype
def test_every_value_obeys_the_rule(dtype):
    z = every(dtype)
    value, again, slope = gelus(z, dtype)
    low = z.clone().requires_grad_()
    reference = torch.nn.functional.gelu(low)
    (reference_slope,) = torch.autograd.grad(reference.sum(), low)
    exact_value, exact_slope = exact(z)
    assert torch.equal(value, again)
    assert_within_rule("GELU", value.to(dtype), reference.detach(), exact_value)
    assert_within_rule("GELU'", slope.to(dtype), reference_slope, exact_slope)


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 3.5e-7), (torch.bfloat16, 1.25e-5)], ids=str)
def test_errors_before_rounding_are_the_documented_ones(dtype, largest):
    """float32's own rounding of a sum near 1 is 6e-8, and comes on top of the polynomial's 1.6e-7."""
    z = torch.linspace(-10, 10, 200001)
    value, _, slope = gelus(z, dtype)
    exact_value, exact_slope = exact(z)
    # Beyond 1 the rounding of GELU grows with it.
    assert ((value - exact_value).abs() / z.abs().clamp(min=1)).max() <= largest
    assert (slope - exact_slope).abs().max() <= largest


@each_dtype
def test_what_is_not_finite_stays_so_and_large_values_pass(dtype):
    z = torch.tensor([float("nan"), float("inf"), 300.0, -300.0, -0.0])
    value, _, slope = gelus(z, dtype)
    assert value[0].isnan() and slope[0].isnan()
    assert value[1:3].tolist() == [float("inf"), 300.0]
    assert value[3:].abs().max() < 1e-7
    assert slope[2:4].tolist() == pytest.approx([1, 0], abs=1e-6)

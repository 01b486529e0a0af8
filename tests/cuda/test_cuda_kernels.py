"""The kernels of csrc/cuda on multiply-adds, compiled for the CPU (cuda_on_cpu/), against a float64 reference.

Every access is checked by AddressSanitizer, alignment included; the threads of a block run in shuffled order, so a
barrier that is missing gives wrong numbers, which test_cuda_order.py shows. The rule is that of cuda_rule.py.
"""

import math
import shutil

import pytest
import torch
from cuda_program import SM_80, SM_86, SM_90
from cuda_rule import MASKS, SMALL, assert_rule, check_backward, check_forward, each_dtype, each_shape
from operands import Shape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


@each_shape
@each_dtype
def test_forward_obeys_the_rule(run, shape, dtype):
    check_forward(run, shape, dtype)


@each_shape
@each_dtype
def test_backward_obeys_the_rule(run, shape, dtype):
    check_backward(run, shape, dtype)


# Every way of cutting the map, and every unrolled kernel width; channels beyond a block, odd, and fewer than a vector.
CUT = [
    ("whole map", SM_90, Shape(2, 14, 14, 40, (3, 5, 7))),
    ("whole map", SM_90, Shape(1, 28, 28, 36, (3, 5, 7, 9), normalize=True)),
    ("whole map", SM_80, Shape(1, 19, 22, 17, (11, 13, 15))),
    ("whole map", SM_86, Shape(1, 7, 7, 800, (5, 7))),
    ("tiles", SMALL, Shape(1, 48, 57, 9, (3, 5), normalize=True)),
    ("tiles", SMALL, Shape(2, 60, 43, 8, (3, 3, 3, 3))),
    ("levels", SMALL, Shape(2, 40, 29, 12, (9, 11, 13))),
    ("levels", SMALL, Shape(1, 23, 61, 7, (11, 13), normalize=True)),
]


@pytest.mark.parametrize(("path", "device", "shape"), CUT, ids=str)
@each_dtype
def test_every_path_obeys_the_rule(run, path, device, shape, dtype):
    assert check_forward(run, shape, dtype, device) == path


def test_the_slope_of_gelu_in_float32_is_what_the_formula_gives_in_float32(run):
    """A 1x1 kernel of ones, a gate and a gradient of one make dctx GELU' itself. The rule holds in every interval of
    length one, against the formula as PyTorch writes it for a GPU, which is more exact than its CPU's below zero;
    below -6 an absolute bound."""
    shape = (1, 28, 28, 8)
    ctx = torch.linspace(-8, 8, math.prod(shape))[torch.randperm(math.prod(shape))].view(shape)
    gates = torch.tensor([1.0, 0.0]).expand(*shape[:3], 2)
    packed = torch.cat([ctx, gates], -1)
    options = {"dagg": torch.ones(shape), "mask": (True, False, False, False)}
    _, (dctx, *_) = run(packed[..., :8], packed[..., 8:], [torch.ones(8, 1, 1, 1)], False, **options)

    def formula(z):
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5

    exact = formula(ctx.double())
    assert (dctx - exact)[ctx < -6].abs().max() <= 2**-28
    for first in range(-6, 8):
        held = (ctx >= first) & (ctx < first + 1)
        assert_rule(f"GELU' from {first}", dctx[held], formula(ctx)[held], exact[held])


# Backward has two paths; what fits as whole planes in one launch goes level by level on a device with less memory.
BACKWARD = [
    ("whole map", SM_90, Shape(2, 14, 14, 40, (3, 5, 7))),
    ("whole map", SM_90, Shape(1, 28, 28, 12, (3, 5, 7, 9), normalize=True)),
    ("whole map", SM_80, Shape(1, 12, 13, 17, (11, 13, 15))),
    ("whole map", SM_86, Shape(1, 7, 7, 100, (15, 17))),
    ("levels", SMALL, Shape(1, 40, 37, 9, (3, 5, 7), normalize=True)),
    ("levels", SMALL, Shape(2, 28, 31, 12, (9, 11, 13))),
    ("levels", SMALL, Shape(1, 27, 34, 7, (15, 17))),
    ("levels", SMALL, Shape(1, 50, 52, 24, (5,))),
]


@pytest.mark.parametrize(("path", "device", "shape"), BACKWARD, ids=str)
@each_dtype
def test_every_path_of_backward_obeys_the_rule(run, path, device, shape, dtype):
    assert check_backward(run, shape, dtype, device) == path


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("path", "device", "shape"),
    [("whole map", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))), ("levels", SMALL, Shape(1, 40, 37, 8, (3, 5, 7)))],
    ids=["whole map", "levels"],
)
def test_backward_computes_what_is_asked_for(run, path, device, shape, mask):
    assert check_backward(run, shape, torch.float32, device, mask) == path

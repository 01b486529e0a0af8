"""The kernels of csrc/cuda on tensor cores, compiled for the CPU as those of test_cuda_kernels.py are, under one rule.

`mma` and `ldmatrix` are those of cuda_on_cpu/warp_matrix.h. A bank conflict of ldmatrix is a failure.
"""

import math
import shutil

import pytest
import torch
from cuda_program import SM_80, SM_86, SM_90, Device
from cuda_rule import (
    FEW_CHANNELS,
    MASKS,
    ONE,
    SIXTEEN,
    SMALL,
    assert_rule,
    check_backward,
    check_forward,
    each_low_dtype,
    each_shape,
)
from operands import Shape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


# Planes: every number of blocks of columns, eight channels and sixteen; groups of images of which the last is
# not full, taken in turn by one block of threads, rows beyond the only image, kernels that are tall and of one column,
# more gates than four; channels that do not fill a block or half of one, and those that no wide load takes.
# Whole maps and tiles: blocks of several images and of one, warps that share a channel, halo, kernels of two steps;
# channels that are odd or do not fill a block; maps beyond 16 rows and 8 columns by one.
TENSOR_CORES = [
    ("planes", SM_90, Shape(2, 14, 14, 40, (3, 5, 7))),
    ("planes", SM_90, Shape(21, 7, 7, 17, (3, 5, 7), normalize=True)),
    ("planes", ONE, Shape(5, 28, 28, 12, (3, 5, 7))),
    ("planes", SM_90, Shape(1, 56, 56, 4, (3, 5, 7))),
    ("planes", ONE, Shape(3, 43, 48, 9, (5, 7, 9), normalize=True)),
    ("planes", ONE, Shape(3, 28, 28, 1, (3, 5, 7))),
    ("planes", ONE, Shape(3, 43, 51, 13, (3, 5, 7))),
    *[("planes", ONE, shape) for shape in SIXTEEN],
    ("planes", SM_90, Shape(3, 17, 19, 36, (3, 5, 7, 9), normalize=True)),
    ("planes", SM_86, Shape(3, 5, 8, 8, ((15, 1), (9, 9)))),
    ("whole maps", SM_86, Shape(17, 1, 1, 12, (9,))),
    ("whole maps", SM_90, Shape(2, 14, 14, 40, (3, 5, 11))),
    ("whole maps", SM_90, Shape(5, 7, 7, 17, (3, 5, 11), normalize=True)),
    ("whole maps", SM_80, Shape(1, 19, 22, 17, (11, 13, 15))),
    ("whole maps", SM_86, Shape(3, 5, 41, 8, ((3, 15), (9, 1)))),
    ("whole maps", SM_86, Shape(2, 57, 35, 12, (3, 5))),
    ("tiles", SMALL, Shape(1, 48, 57, 9, (3, 5), normalize=True)),
    ("tiles", SMALL, Shape(1, 48, 57, 8, (3, 5, 7))),
    ("tiles", SMALL, Shape(2, 63, 49, 8, (3, 3, 3, 3))),
    ("tiles", Device(64, 100, 4), Shape(1, 53, 61, 7, (11, 13))),
]


@each_shape
@each_low_dtype
def test_forward_on_tensor_cores_obeys_the_rule(run, shape, dtype):
    check_forward(run, shape, dtype, tensor_cores=True)


@pytest.mark.parametrize(("path", "device", "shape"), TENSOR_CORES, ids=str)
@each_low_dtype
def test_every_path_of_forward_on_tensor_cores_obeys_the_rule(run, path, device, shape, dtype):
    assert check_forward(run, shape, dtype, device, tensor_cores=True) == path


@each_low_dtype
def test_gelu_on_tensor_cores_over_its_whole_range(run, dtype):
    """A 1x1 kernel of ones and a gate of one make the operator GELU itself. The rule holds from each power of two to
    the next, in the tail below -4 an absolute bound."""
    z = torch.arange(2**15, dtype=torch.int16).view(dtype)
    z = z[(z >= 2**-10) & (z <= 64)]
    shape = (2, 56, 56, 8)
    ctx = torch.cat([z, -z]).repeat(25)[: math.prod(shape)].view(shape)
    gates = torch.tensor([1.0, 0.0], dtype=dtype).expand(*shape[:3], 2)
    packed = torch.cat([ctx, gates], -1)
    weights = [torch.ones(8, 1, 1, 1, dtype=dtype)]
    options = {"device": ONE, "tensor_cores": True}
    path, (agg,) = run(packed[..., :8], packed[..., 8:], weights, False, **options)
    assert path == "planes"
    z, mine = ctx.flatten(), agg.flatten()
    exact, low = torch.nn.functional.gelu(z.double()), torch.nn.functional.gelu(z)
    for power in range(-10, 6):
        for sign in (1, -1) if power < 2 else (1,):
            held = (sign * z >= 2.0**power) & (sign * z < 2.0 ** (power + 1))
            assert_rule(f"GELU from {sign * 2.0**power}", mine[held], low[held], exact[held])
    assert (mine - exact)[z <= -4].abs().max() <= 2**-13


# As for forward; whole maps that few channels of fit go through planar copies: one image of a block and several, odd
# columns, more channels than a warp turns, channels that do not fill a block. What does not fit as whole maps goes
# level by level in bands of rows: one band and several, kernels of two steps, odd channels and columns, kernels of one
# row.
BACKWARD_ON_TENSOR_CORES = [
    ("whole maps", SM_90, Shape(2, 14, 14, 20, (3, 5, 7))),
    ("whole maps", SM_90, Shape(5, 7, 7, 9, (3, 5, 7), normalize=True)),
    ("whole maps", SM_90, Shape(1, 28, 28, 4, (3, 5, 7))),
    ("whole maps", SM_90, Shape(1, 17, 9, 36, (3, 5, 7, 9), normalize=True)),
    ("whole maps", SM_80, Shape(1, 19, 22, 7, (11, 13, 15))),
    ("whole maps", SM_86, Shape(3, 5, 41, 8, ((3, 15), (9, 1)))),
    ("whole maps", SM_86, Shape(17, 1, 1, 12, (9,))),
    ("planar", Device(227, 228, 1), Shape(2, 56, 56, 9, (3, 5, 7))),
    ("planar", SM_90, Shape(1, 56, 56, 20, (3, 5, 7), normalize=True)),
    ("planar", SM_90, Shape(3, 39, 43, 9, (3, 5, 7, 9))),
    ("planar", SM_90, Shape(1, 50, 51, 34, (5,))),
    ("planar", FEW_CHANNELS, Shape(5, 25, 24, 35, (3, 5), normalize=True)),
    ("planar", Device(227, 228, 1), Shape(1, 40, 37, 34, (11, 13))),
    ("planar", Device(32, 48, 4), Shape(9, 7, 7, 36, (3, 5))),
    ("bands", SMALL, Shape(1, 40, 37, 9, (3, 5, 7), normalize=True)),
    ("bands", SMALL, Shape(2, 50, 24, 6, (5, 7, 9))),
    ("bands", SMALL, Shape(1, 33, 57, 5, ((1, 15), (13, 3)))),
    ("bands", SMALL, Shape(1, 60, 43, 4, (3,))),
    ("bands", SM_86, Shape(1, 56, 56, 8, (3, 5, 7))),
]


@each_shape
@each_low_dtype
def test_backward_on_tensor_cores_obeys_the_rule(run, shape, dtype):
    check_backward(run, shape, dtype, tensor_cores=True)


@pytest.mark.parametrize(("path", "device", "shape"), BACKWARD_ON_TENSOR_CORES, ids=str)
@each_low_dtype
def test_every_path_of_backward_on_tensor_cores_obeys_the_rule(run, path, device, shape, dtype):
    assert check_backward(run, shape, dtype, device, tensor_cores=True) == path


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("path", "device", "shape"),
    [
        ("whole maps", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))),
        ("planar", FEW_CHANNELS, Shape(5, 25, 23, 35, (3, 5))),
        ("bands", SMALL, Shape(1, 40, 37, 8, (3, 5, 7))),
    ],
    ids=["whole maps", "planar", "bands"],
)
def test_backward_on_tensor_cores_computes_what_is_asked_for(run, path, device, shape, mask):
    assert check_backward(run, shape, torch.bfloat16, device, mask, tensor_cores=True) == path

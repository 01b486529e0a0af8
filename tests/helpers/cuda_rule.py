"""The rule of the project for the kernels of csrc/cuda on the CPU: the error against float64 is at most twice that of
the reference in the same precision, plus one unit in the last place. Devices, and what the tests of paths share."""

import pytest
import torch
from cuda_program import SM_90, Device
from operands import SHAPES, Shape, operands

from focalnet import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_low_dtype = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

# Little shared memory, few multiprocessors: a small map is then cut as a large one is on a real device.
SMALL = Device(48, 64, 4)
# A block holds few channels of maps of 24 rows and more: backward on tensor cores takes planar copies.
FEW_CHANNELS = Device(64, 100, 84)
# One block of threads takes everything.
ONE = Device(227, 228, 1)
# Groups of sixteen channels, which planes take where they fit.
SIXTEEN = [
    Shape(17, 7, 7, 32, (3, 5, 7)),
    Shape(9, 7, 9, 20, (3, 5, 7)),
    Shape(5, 13, 13, 33, (3, 5, 7, 9, 3), normalize=True),
    Shape(3, 28, 20, 16, (3, 5, 7)),
    Shape(5, 28, 28, 24, (3, 5)),
    Shape(2, 43, 48, 17, (5, 7, 9), normalize=True),
]
# Of ctx, gates, agg, focal_weights: one alone.
MASKS = [tuple(position == wanted for position in range(4)) for wanted in range(4)]


def gradient_of(ctx, dtype):
    return torch.randn(ctx.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def assert_rule(name, mine, low, exact):
    assert mine.shape == exact.shape and mine.dtype == low.dtype, name
    if not exact.numel():
        return
    ulp = torch.finfo(low.dtype).eps * exact.abs().max()
    assert (mine - exact).abs().max() <= 2 * (low - exact).abs().max() + ulp, name


def check_forward(run, shape, dtype, device=SM_90, tensor_cores=False, **options):
    """Returns the path that was taken."""
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype)
    options |= {"device": device, "tensor_cores": tensor_cores}
    path, (agg,) = run(ctx, gates, focal_weights, shape.normalize, **options)
    exact = reference.gated_aggregation(
        ctx.double(), gates.double(), [w.double() for w in focal_weights], shape.normalize
    )
    assert_rule("agg", agg, reference.gated_aggregation(ctx, gates, focal_weights, shape.normalize), exact)
    return path


def check_backward(run, shape, dtype, device=SM_90, mask=(True,) * 4, tensor_cores=False, **options):
    """``mask`` is of ctx, gates, agg, focal_weights. Returns the path that was taken."""
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype)
    dagg = gradient_of(ctx, dtype)
    options |= {"dagg": dagg, "mask": mask, "device": device, "tensor_cores": tensor_cores}
    path, mine = run(ctx, gates, focal_weights, shape.normalize, **options)

    def expected(dtype):
        inputs = ctx.to(dtype), gates.to(dtype), [w.to(dtype) for w in focal_weights], shape.normalize
        dctx, dgates, *rest = reference.gated_aggregation_bwd(dagg.to(dtype), *inputs, (*mask[:2], mask[3]))
        return [dctx, dgates, reference.gated_aggregation(*inputs) if mask[2] else None, *rest]

    low, exact = expected(dtype), expected(torch.float64)
    names = ["dctx", "dgates", "agg"] + [f"dfocal_weights[{level}]" for level in range(len(focal_weights))]
    for name, gradient, rounded, wanted in zip(names, mine, low, exact, strict=True):
        if wanted is None:
            assert gradient.numel() == 0, name
        else:
            assert_rule(name, gradient, rounded, wanted)
    return path

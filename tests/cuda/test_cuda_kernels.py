"""The kernels of csrc/cuda, compiled for the CPU (cuda_on_cpu/), against a float64 reference; no GPU is needed.

Every access is checked by AddressSanitizer, alignment included; the threads of a block run in shuffled order, so a
barrier that is missing gives wrong numbers, which the last test shows. The rule is the project's: the error against
float64 is at most twice that of the reference in the same precision, plus one unit in the last place.
"""

import math
import re
import shutil

import pytest
import torch
from cuda_program import CUDA, SM_80, SM_86, SM_90, Device, call, compile_sources, modulate, plan
from operands import SHAPES, Shape, operands

from focalnet import reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

# Little shared memory, few multiprocessors: a small map is then cut as a large one is on a real device.
SMALL = Device(48, 64, 4)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_sources(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def run(program, tmp_path):
    def run(*arguments, **options):
        return call(program, tmp_path, *arguments, **options)

    return run


def gradient_of(ctx, dtype):
    return torch.randn(ctx.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def assert_rule(name, mine, low, exact):
    assert mine.shape == exact.shape and mine.dtype == low.dtype, name
    if not exact.numel():
        return
    ulp = torch.finfo(low.dtype).eps * exact.abs().max()
    assert (mine - exact).abs().max() <= 2 * (low - exact).abs().max() + ulp, name


def check_forward(run, shape, dtype, device=SM_90, seed=0, tensor_cores=False):
    """Returns the path that was taken."""
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype)
    options = {"device": device, "seed": seed, "tensor_cores": tensor_cores}
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


# One block of threads takes all groups, of sixteen channels each.
ONE = Device(227, 228, 1)
SIXTEEN = [
    Shape(17, 7, 7, 32, (3, 5, 7)),
    Shape(9, 7, 9, 20, (3, 5, 7)),
    Shape(5, 13, 13, 33, (3, 5, 7, 9, 3), normalize=True),
    Shape(3, 28, 20, 16, (3, 5, 7)),
    Shape(5, 28, 28, 24, (3, 5)),
    Shape(2, 43, 48, 17, (5, 7, 9), normalize=True),
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
    ("tiles", SMALL, Shape(2, 63, 49, 8, (3, 3, 3, 3))),
    ("tiles", Device(64, 100, 4), Shape(1, 53, 61, 7, (11, 13))),
]
low_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)


@each_shape
@low_dtypes
def test_forward_on_tensor_cores_obeys_the_rule(run, shape, dtype):
    check_forward(run, shape, dtype, tensor_cores=True)


@pytest.mark.parametrize(("path", "device", "shape"), TENSOR_CORES, ids=str)
@low_dtypes
def test_every_path_of_forward_on_tensor_cores_obeys_the_rule(run, path, device, shape, dtype):
    assert check_forward(run, shape, dtype, device, tensor_cores=True) == path


@pytest.mark.parametrize(
    ("device", "shape", "channels"),
    [
        *[(ONE, shape, 16) for shape in SIXTEEN],
        (SM_90, Shape(128, 56, 56, 96, (3, 5, 7)), 16),
        (SM_80, Shape(128, 56, 56, 96, (3, 5, 7)), 8),
        (SM_86, Shape(1, 28, 28, 96, (3, 5, 7)), 8),
        (ONE, Shape(5, 28, 28, 15, (3, 5, 7)), 8),
    ],
    ids=str,
)
def test_planes_have_sixteen_channels_where_they_fit_and_fill_the_device(program, tmp_path, device, shape, channels):
    path, _, (forward, *_rest) = plan(program, tmp_path, shape, torch.bfloat16, device, True)
    # Wide maps leave a warp no registers for company: eight take two channels each.
    warps = 8 if shape.width > 16 else channels
    assert (path, forward.block_c, forward.threads) == ("planes", channels, 32 * warps)


@low_dtypes
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
    options = {"device": Device(227, 228, 1), "tensor_cores": True}
    path, (agg,) = run(packed[..., :8], packed[..., 8:], weights, False, **options)
    assert path == "planes"
    z, mine = ctx.flatten(), agg.flatten()
    exact, low = torch.nn.functional.gelu(z.double()), torch.nn.functional.gelu(z)
    for power in range(-10, 6):
        for sign in (1, -1) if power < 2 else (1,):
            held = (sign * z >= 2.0**power) & (sign * z < 2.0 ** (power + 1))
            assert_rule(f"GELU from {sign * 2.0**power}", mine[held], low[held], exact[held])
    assert (mine - exact)[z <= -4].abs().max() <= 2**-13


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
    ("planar", SM_86, Shape(5, 25, 24, 35, (3, 5), normalize=True)),
    ("planar", Device(227, 228, 1), Shape(1, 40, 37, 34, (11, 13))),
    ("planar", Device(32, 48, 4), Shape(9, 7, 7, 36, (3, 5))),
    ("bands", SMALL, Shape(1, 40, 37, 9, (3, 5, 7), normalize=True)),
    ("bands", SMALL, Shape(2, 50, 24, 6, (5, 7, 9))),
    ("bands", SMALL, Shape(1, 33, 57, 5, ((1, 15), (13, 3)))),
    ("bands", SMALL, Shape(1, 60, 43, 4, (3,))),
    ("bands", SM_86, Shape(1, 56, 56, 8, (3, 5, 7))),
]


@each_shape
@low_dtypes
def test_backward_on_tensor_cores_obeys_the_rule(run, shape, dtype):
    check_backward(run, shape, dtype, tensor_cores=True)


@pytest.mark.parametrize(("path", "device", "shape"), BACKWARD_ON_TENSOR_CORES, ids=str)
@low_dtypes
def test_every_path_of_backward_on_tensor_cores_obeys_the_rule(run, path, device, shape, dtype):
    assert check_backward(run, shape, dtype, device, tensor_cores=True) == path


# One of each path of backward.
PACKED = [
    (False, "whole map", SM_90, Shape(2, 6, 7, 12, (3, 5))),
    (False, "levels", SMALL, Shape(1, 40, 37, 10, (3, 5, 7))),
    (True, "whole maps", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))),
    (True, "planar", SM_86, Shape(2, 24, 25, 64, (3, 5))),
    (True, "planar", SM_86, Shape(2, 24, 25, 35, (3, 5))),
    (True, "bands", SMALL, Shape(1, 40, 37, 9, (3, 5), normalize=True)),
]


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(("tensor_cores", "path", "device", "shape"), PACKED, ids=str)
def test_a_packed_gradient_gets_the_same_bits_and_nothing_beside_them(run, tensor_cores, path, device, shape, padded):
    """Rows at multiples of 16 elements, and rows that follow each other, whose parts are aligned to one element."""
    dtype = torch.bfloat16 if tensor_cores else torch.float32
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype)
    options = {"dagg": gradient_of(ctx, dtype), "device": device, "tensor_cores": tensor_cores}
    _, (dctx, dgates, *expected) = run(ctx, gates, focal_weights, shape.normalize, **options)
    used = 2 * shape.channels + len(shape.kernels) + 1
    pitch = math.ceil(used / 16) * 16 if padded else used
    taken, (rows, *made) = run(ctx, gates, focal_weights, shape.normalize, gradient_pitch=pitch, **options)
    assert taken == path
    dq, *parts, padding = rows.split([shape.channels, shape.channels, len(shape.kernels) + 1, pitch - used], -1)
    assert all(torch.equal(a, b) for a, b in zip([*parts, *made], [dctx, dgates, *expected], strict=True))
    assert dq.isnan().all() and padding.isnan().all()


MASKS = [tuple(position == wanted for position in range(4)) for wanted in range(4)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("path", "device", "shape"),
    [("whole map", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))), ("levels", SMALL, Shape(1, 40, 37, 8, (3, 5, 7)))],
    ids=["whole map", "levels"],
)
def test_backward_computes_what_is_asked_for(run, path, device, shape, mask):
    assert check_backward(run, shape, torch.float32, device, mask) == path


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("path", "device", "shape"),
    [
        ("whole maps", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))),
        ("planar", SM_86, Shape(5, 25, 23, 35, (3, 5))),
        ("bands", SMALL, Shape(1, 40, 37, 8, (3, 5, 7))),
    ],
    ids=["whole maps", "planar", "bands"],
)
def test_backward_on_tensor_cores_computes_what_is_asked_for(run, path, device, shape, mask):
    assert check_backward(run, shape, torch.bfloat16, device, mask, tensor_cores=True) == path


# The stages of the published variants at their image sizes, and detection maps.
STAGES = [
    Shape(batch, size // scale, size // scale, width * scale // 4, kernels)
    for batch in (1, 128)
    for size, width, kernels in [
        (224, 96, (3, 5, 7)),
        (224, 128, (3, 5)),
        (384, 192, (5, 7, 9)),
        (384, 192, (3, 5, 7, 9)),
    ]
    for scale in (4, 8, 16, 32)
] + [Shape(2, 200, 334, 96, kernels) for kernels in [(9, 11), (9, 11, 13), (11, 13, 15)]]


@pytest.mark.parametrize("device", [SM_80, SM_86, SM_90], ids=["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("tensor_cores", [False, True], ids=["multiply-adds", "tensor cores"])
@each_dtype
def test_every_launch_fits_the_device(program, tmp_path, device, dtype, tensor_cores):
    """So do the largest kernels that are taken, at any number of levels."""
    if tensor_cores and dtype == torch.float32:
        return
    largest = [(31,), (31,) * 8] if not tensor_cores else [(15,) * 3, (7,) * 8, ((1, 15), (13, 1), 15, (15, 13))]
    extremes = [Shape(1, height, width, 64, k) for k in largest for height, width in [(300, 300), (1, 999), (999, 1)]]
    for shape in [*STAGES, *extremes, Shape(1, 1, 1, 1, largest[-1])]:
        *_, cuts = plan(program, tmp_path, shape, dtype, device, tensor_cores)
        for cut in cuts:
            assert cut.fits and cut.shared_bytes <= 1024 * device.shared_per_block, (shape, cut)


def test_the_stages_of_the_tiny_model_are_taken_as_whole_maps_on_hopper(program, tmp_path):
    """Each block then reads ctx once and writes agg once, and the global level needs no second pass."""
    for stage in STAGES:
        if stage.batch == 128 and stage.kernels == (3, 5, 7):
            forward, backward, _ = plan(program, tmp_path, stage, torch.bfloat16, SM_90)
            assert forward == "whole map"
            assert backward == ("levels" if stage.height == 56 else "whole map")


@pytest.mark.parametrize(("dtype", "tensor_cores"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_views_with_any_strides(run, dtype, tensor_cores):
    """Transposed rows, a gap between positions and an expanded batch are read where they lie."""
    shape = Shape(3, 9, 11, 24, (3, 5))
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype)
    storage = torch.cat([ctx, gates, ctx[..., :1]], -1).transpose(1, 2).contiguous().transpose(1, 2)[:1]
    ctx, gates = storage[..., :24].expand(3, -1, -1, -1), storage[..., 24:27].expand(3, -1, -1, -1)
    _, (agg,) = run(ctx, gates, focal_weights, False, tensor_cores=tensor_cores)
    packed = torch.cat([ctx, gates], -1).contiguous()
    _, (same,) = run(packed[..., :24], packed[..., 24:], focal_weights, False, tensor_cores=tensor_cores)
    assert torch.equal(agg, same)


@pytest.mark.parametrize(
    ("path", "device", "shape"),
    [("whole maps", SM_90, Shape(2, 14, 14, 64, (3, 5))), ("planar", SM_86, Shape(2, 24, 25, 64, (3, 5)))],
    ids=["whole maps", "planar"],
)
def test_backward_on_tensor_cores_of_a_projection_of_any_alignment(run, path, device, shape):
    """It is read in vectors of one channel, of four and of eight."""
    _, ctx, gates, focal_weights, *_ = operands(shape, torch.bfloat16)

    def outputs(pitch):
        packed = torch.cat([ctx, gates], -1)
        packed = torch.nn.functional.pad(packed, (0, pitch - packed.shape[-1]))
        options = {"dagg": gradient_of(ctx, torch.bfloat16), "device": device, "tensor_cores": True}
        taken, results = run(packed[..., :64], packed[..., 64:67], focal_weights, False, **options)
        assert taken == path
        return results

    first, *others = map(outputs, (67, 68, 72))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("dtype", "tensor_cores"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(run, dtype, tensor_cores):
    _, ctx, gates, focal_weights, *_ = operands(Shape(2, 17, 20, 20, (3, 5)), dtype)
    dagg = gradient_of(ctx, dtype)
    devices = [SM_90, Device(64, 100, 1), Device(32, 48, 4)] if tensor_cores else [SMALL]
    for options in ({"device": device} | more for device in devices for more in ({}, {"dagg": dagg})):
        options |= {"tensor_cores": tensor_cores}
        (_, first), (_, second) = (run(ctx, gates, focal_weights, False, seed=seed, **options) for seed in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "tensor_cores"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_nan_stays_within_its_channel_and_image(run, dtype, tensor_cores):
    _, ctx, gates, focal_weights, *_ = operands(Shape(2, 6, 6, 8, (3, 5)), dtype)
    ctx[1, 3, 3, 5] = float("nan")
    outputs = [run(ctx, gates, focal_weights, False, tensor_cores=tensor_cores)[1][0]]
    dagg = gradient_of(ctx, dtype)
    outputs.append(run(ctx, gates, focal_weights, False, dagg=dagg, tensor_cores=tensor_cores)[1][0])
    for out in outputs:
        assert out[1, ..., 5].isnan().all()
        assert not out[0].isnan().any() and not out[1, ..., :5].isnan().any() and not out[1, ..., 6:].isnan().any()


BARRIERS = {
    "between the levels": ("gated_aggregation_fwd.cu", "        inside = outputs;\n        __syncthreads();\n"),
    "behind the zeros": ("toeplitz_fwd.cu", "    __syncthreads();\n    load_planes(b);\n"),
    "behind the zeros of the planes": (
        "toeplitz_fwd_planes.cu",
        "        __syncthreads();\n        b.turn = next;\n",
    ),
    "before planes are written": ("toeplitz_fwd_planes.cu", "            __syncthreads();\n            with_width"),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_missing_is_seen(program, tmp_path, barrier):
    """With one of the barriers turned off the numbers are wrong: the tests above would fail."""
    source, line = BARRIERS[barrier]
    text = (CUDA / source).read_text()
    changed = text.replace(line, re.sub(r"__sync\w+\(\);", "", line))
    assert changed != text
    broken = shutil.copytree(program.parent, tmp_path / "broken")
    (broken / source).write_text(changed)
    program = compile_sources(broken, [broken / source])
    tensor_cores = source.startswith("toeplitz_fwd")
    kernels = (3, 5, 11) if source == "toeplitz_fwd.cu" else (3, 5, 7)
    shape, dtype, device = Shape(4, 14, 14, 32, kernels), DTYPES[tensor_cores], Device(227, 228, 1)
    with pytest.raises(AssertionError, match="agg"):
        check_forward(
            lambda *a, **o: call(program, tmp_path, *a, **o), shape, dtype, device, tensor_cores=tensor_cores
        )


# ---- products by rows (modulate.cu): a product is rounded once, the sum over the rows obeys the rule ---------------

each_sum = pytest.mark.parametrize("want_sum", [False, True], ids=["product", "product and sum"])

# (rows, C, offset and pitch of q and of the product, multiprocessors)
ROWS = {
    "contiguous": (50, 96, 0, 96, 0, 96, 4),
    "part of a padded projection": (50, 96, 96, 208, 0, 208, 4),
    "8 bytes": (50, 96, 4, 196, 0, 96, 4),
    "2 bytes": (50, 96, 0, 195, 1, 195, 4),
    "odd channels": (70, 13, 3, 29, 0, 13, 4),
    "one channel": (600, 1, 0, 5, 2, 3, 1),
    "more vectors than threads": (9, 1001, 0, 1001, 0, 1003, 2),
    "more rows than blocks at once take": (3000, 8, 0, 24, 8, 16, 1),
    "one row for all rows": (40, 16, 0, 0, 0, 16, 4),
    "one row": (1, 24, 0, 24, 0, 24, 132),
    "no rows": (0, 24, 0, 24, 0, 24, 4),
}


def rows_of(rows, channels, offset, pitch, dtype):
    """Positive numbers, so that a sum is no difference of large ones, whose rounding nobody bounds."""
    storage = torch.rand(offset + (rows - 1) * pitch + channels if rows else 0, dtype=torch.float64).to(dtype)
    return storage.as_strided((rows, channels), (pitch, 1), offset if rows else 0)


def factors(case, dtype):
    rows, channels, offset, pitch, out_offset, out_pitch, multiprocessors = ROWS[case]
    dout = rows_of(rows, channels, 0, channels, dtype)
    q = rows_of(rows, channels, offset, pitch, dtype)
    return dout, q, rows_of(rows, channels, out_offset, out_pitch, dtype), multiprocessors


def unwritten(storage, out):
    """The elements of a storage beside those of ``out``."""
    written = torch.zeros(storage.shape, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    return storage[~written]


@pytest.mark.parametrize("case", ROWS)
@each_dtype
@each_sum
def test_a_product_by_rows_has_pytorchs_bits_and_its_sum_obeys_the_rule(program, tmp_path, case, dtype, want_sum):
    dout, q, out, multiprocessors = factors(case, dtype)
    storage, total, _ = modulate(program, tmp_path, dout, q, out, want_sum, multiprocessors)
    assert torch.equal(storage.as_strided(out.shape, out.stride(), out.storage_offset()), dout * q)
    assert unwritten(storage, out).isnan().all()
    if want_sum:
        exact = (dout.double() * q.double()).sum(0)
        assert_rule("sum", total, (dout * q).sum(0), exact)


@pytest.mark.parametrize("case", ["contiguous", "2 bytes", "odd channels"])
@each_dtype
def test_a_product_replaces_its_factor(program, tmp_path, case, dtype):
    modulator, q, *_ = factors(case, dtype)
    storage, *_ = modulate(program, tmp_path, modulator, q)
    assert torch.equal(storage.view(modulator.shape), modulator * q)


def test_a_sum_does_not_depend_on_the_order_of_threads_and_blocks(program, tmp_path):
    dout, q, out, multiprocessors = factors("part of a padded projection", torch.float32)
    (_, first, _), (_, second, _) = (
        modulate(program, tmp_path, dout, q, out, True, multiprocessors, seed) for seed in (1, 2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("images", [1, 4])
def test_a_product_of_few_images_has_blocks_for_every_multiprocessor(program, tmp_path, images):
    modulator, q = (rows_of(images * 56 * 56, 96, 0, 96, torch.bfloat16) for _ in range(2))
    *_, (launches, blocks) = modulate(program, tmp_path, modulator, q)
    assert launches == 1 and blocks >= 132


def test_a_barrier_that_is_missing_in_a_sum_is_seen(program, tmp_path):
    line = "        __syncthreads();\n        if (row + half"
    text = (CUDA / "modulate.cu").read_text()
    changed = text.replace(line, line.replace("__syncthreads();", ""))
    assert changed != text
    broken = shutil.copytree(program.parent, tmp_path / "broken")
    (broken / "modulate.cu").write_text(changed)
    program = compile_sources(broken, [broken / "modulate.cu"])
    dout, q, out, multiprocessors = factors("contiguous", torch.float32)
    _, total, _ = modulate(program, tmp_path, dout, q, out, True, multiprocessors)
    assert not torch.allclose(total, (dout * q).sum(0))

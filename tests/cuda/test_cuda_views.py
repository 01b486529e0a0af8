"""Where the kernels of csrc/cuda read and write: strided views, packed gradients, NaN that stays where it is."""

import math
import shutil

import pytest
import torch
from cuda_program import SM_90
from cuda_rule import FEW_CHANNELS, ONE, SMALL, gradient_of
from operands import Shape, operands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


# One of each path of backward.
PACKED = [
    (False, "whole map", SM_90, Shape(2, 6, 7, 12, (3, 5))),
    (False, "levels", SMALL, Shape(1, 40, 37, 10, (3, 5, 7))),
    (True, "whole maps", SM_90, Shape(2, 9, 10, 12, (3, 5, 7))),
    (True, "planar", FEW_CHANNELS, Shape(2, 24, 25, 64, (3, 5))),
    (True, "planar", FEW_CHANNELS, Shape(2, 24, 25, 35, (3, 5))),
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


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        (ONE, Shape(2, 56, 56, 9, (3, 5, 7))),
        (FEW_CHANNELS, Shape(5, 25, 24, 35, (3, 5), normalize=True)),
        (ONE, Shape(1, 40, 40, 34, (11, 13))),
    ],
    ids=str,
)
@pytest.mark.parametrize("agg", [True, False], ids=["agg", "no agg"])
def test_planar_maps_give_the_same_bits(run, device, shape, agg):
    """A gradient that a product wrote planar, and agg for the products that read it, instead of copies that turn."""
    _, ctx, gates, focal_weights, *_ = operands(shape, torch.bfloat16)
    options = {"dagg": gradient_of(ctx, torch.bfloat16), "device": device, "tensor_cores": True}
    options["mask"] = (True, True, agg, True)
    (path, expected), (_, made) = (
        run(ctx, gates, focal_weights, shape.normalize, planar=planar, **options) for planar in (False, True)
    )
    assert path == "planar"
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


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
    [("whole maps", SM_90, Shape(2, 14, 14, 64, (3, 5))), ("planar", FEW_CHANNELS, Shape(2, 24, 25, 64, (3, 5)))],
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
def test_nan_stays_within_its_channel_and_image(run, dtype, tensor_cores):
    _, ctx, gates, focal_weights, *_ = operands(Shape(2, 6, 6, 8, (3, 5)), dtype)
    ctx[1, 3, 3, 5] = float("nan")
    outputs = [run(ctx, gates, focal_weights, False, tensor_cores=tensor_cores)[1][0]]
    dagg = gradient_of(ctx, dtype)
    outputs.append(run(ctx, gates, focal_weights, False, dagg=dagg, tensor_cores=tensor_cores)[1][0])
    for out in outputs:
        assert out[1, ..., 5].isnan().all()
        assert not out[0].isnan().any() and not out[1, ..., :5].isnan().any() and not out[1, ..., 6:].isnan().any()

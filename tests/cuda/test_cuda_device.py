"""The backend `cuda` on a GPU: the numbers of test_cuda_kernels.py on the device itself, and what only one shows."""

import re
from dataclasses import replace

import pytest
import torch
from operands import SHAPES, Shape, operands
from rule import assert_within_rule

import focalnet
from focalnet import reference
from focalnet.backends import cuda
from focalnet.backends.problem import Problem
from focalnet.operators.norm_linear import padded_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.missing() is not None, reason=f"the backend cuda cannot run here: {cuda.missing()}"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The stages of a model at 224 and 384, a detection map, and what only the general path takes.
STAGES = [
    Shape(2, 56, 56, 96, (3, 5, 7)),
    Shape(2, 28, 28, 192, (3, 5, 7)),
    Shape(2, 14, 14, 384, (3, 5, 7)),
    Shape(2, 7, 7, 768, (3, 5)),
    Shape(1, 96, 96, 192, (3, 5, 7, 9), normalize=True),
    Shape(1, 200, 334, 96, (11, 13, 15)),
    Shape(1, 33, 21, 101, (31, 17)),
]


def results(arguments, dtype, normalize, backend):
    """out, then the gradients of all arguments, on the CPU."""
    *images, focal_weights, weight, bias = arguments
    leaves = [t.detach().to("cuda", dtype).requires_grad_() for t in (*images, *focal_weights, weight)]
    if bias is not None:
        leaves.append(bias.detach().to("cuda", dtype).requires_grad_())
    q, ctx, gates, *rest = leaves
    levels = len(focal_weights)
    out = focalnet.focal_modulation(
        q, ctx, gates, rest[:levels], *rest[levels:], normalize_modulator=normalize, backend=backend
    )
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, dout.to(arguments[0].dtype).to("cuda", dtype))
    return [t.detach().cpu() for t in (out, *gradients)]


def reference_results(arguments, dtype, normalize):
    """Those of the reference in ``dtype``. cuDNN would choose kernels for seconds, and round float32 to TF32."""
    with torch.backends.cudnn.flags(enabled=False):
        return results(arguments, dtype, normalize, "reference")


# The rule compares two largest errors, and of the few numbers of a 1x1 map these are chance: it gets more images.
MANY = [replace(shape, batch=64) if shape.height * shape.width == 1 else shape for shape in SHAPES]


@pytest.mark.parametrize("shape", [*STAGES, *MANY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_obey_the_rule(shape, dtype):
    arguments = operands(shape, dtype)
    exact = reference_results(arguments, torch.float64, shape.normalize)
    rounded = reference_results(arguments, dtype, shape.normalize)
    mine = results(arguments, dtype, shape.normalize, "cuda")
    for position, (m, r, e) in enumerate(zip(mine, rounded, exact, strict=True)):
        if e.numel():
            ulp = torch.finfo(dtype).eps * e.abs().max()
            assert (m - e).abs().max() <= 2 * (r - e).abs().max() + ulp, f"tensor {position}"


def on_device(shape, dtype=torch.bfloat16):
    _, ctx, gates, focal_weights, *_ = operands(shape, dtype, "cuda")
    return ctx, gates, focal_weights, torch.randn_like(ctx)


def call(ctx, gates, focal_weights, dagg):
    agg = cuda.gated_aggregation(ctx, gates, focal_weights, False)
    return [agg, *cuda.gated_aggregation_bwd(dagg, ctx, gates, focal_weights, False, [True] * 3)]


@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_the_same_bits_run_after_run(shape):
    arguments = on_device(shape)
    assert all(torch.equal(a, b) for a, b in zip(call(*arguments), call(*arguments), strict=True))


@pytest.mark.parametrize("shape", STAGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bit_types_run_on_tensor_cores(shape, dtype):
    """A call gives the bits of the path that the backend names: tensor cores, or multiply-adds and a reason."""
    ctx, gates, focal_weights, dagg = on_device(shape, dtype)
    problem = Problem("gated_aggregation", ctx.device, dtype, *ctx.shape, tuple(shape.kernel_sizes))
    tensor_cores = dtype != torch.float32 and max(map(max, shape.kernel_sizes)) <= cuda.MAX_TOEPLITZ_KERNEL
    assert (cuda.why_not_tensor_cores(problem) is None) == tensor_cores
    inputs = ctx, gates, focal_weights, False, tensor_cores
    named = [torch.ops.focalnet.cuda_gated_aggregation(*inputs)]
    dctx, dgates, _, *dfocal_weights = torch.ops.focalnet.cuda_gated_aggregation_bwd(
        dagg, *inputs, [True, True, False, True]
    )
    named += [dctx, dgates, *dfocal_weights]
    mine = call(ctx, gates, focal_weights, dagg)
    assert all(torch.equal(a, b) for a, b in zip(mine, named, strict=True))


def packed(shape, dtype):
    """(dout, q, ctx, gates, focal_weights, weight, bias, normalize_modulator), with views of a padded projection."""
    q, ctx, gates, *weights = operands(shape, dtype, "cuda")
    rows = torch.cat([q, ctx, gates], -1)
    parts = padded_empty(rows, rows.shape).copy_(rows).split([q.shape[-1], q.shape[-1], gates.shape[-1]], -1)
    return torch.randn_like(q, memory_format=torch.contiguous_format), *parts, *weights, shape.normalize


@pytest.mark.parametrize("shape", [*SHAPES, *STAGES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_gradient_gets_the_same_bits_and_nothing_beside_them(shape, dtype):
    call = *packed(shape, dtype), (True,) * 6
    expected = cuda.focal_modulation_bwd(*call)
    like, sizes = call[0], [part.shape[-1] for part in call[1:4]]
    rows = padded_empty(like, (*like.shape[:-1], sum(sizes)))
    whole = rows.as_strided((*rows.shape[:-1], rows.stride(-2)), rows.stride()).fill_(7)
    parts = rows.split(sizes, -1)
    made = cuda.focal_modulation_bwd(*call, out=parts)
    assert all(gradient is part for gradient, part in zip(made, parts, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True) if b is not None)
    assert (whole[..., sum(sizes) :] == 7).all()


def test_planar_maps_give_the_bits_of_copies_that_turn():
    """Where the plan is planar, a planar dagg is taken as it is and agg is planar; the numbers are the same."""
    ctx, gates, focal_weights, dagg = on_device(Shape(128, 56, 56, 96, (3, 5, 7)))
    assert torch.ops.focalnet.cuda_takes_planar_maps(ctx, focal_weights, True)
    planar = dagg.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    made, expected = (
        torch.ops.focalnet.cuda_gated_aggregation_bwd(one, ctx, gates, focal_weights, False, True, [True] * 4)
        for one in (planar, dagg)
    )
    assert made[2].stride() == planar.stride() and expected[2].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_gradients_through_planar_maps_obey_the_rule():
    arguments = packed(Shape(128, 56, 56, 96, (3, 5, 7)), torch.bfloat16)
    mask = (True,) * 6
    exact = reference.focal_modulation_bwd(
        *[[t.double() for t in one] if isinstance(one, list) else one.double() for one in arguments[:-1]],
        arguments[-1],
        mask,
    )
    with torch.backends.cudnn.flags(enabled=False):
        rounded = reference.focal_modulation_bwd(*arguments, mask)
    mine = cuda.focal_modulation_bwd(*arguments, mask)
    for position, (m, r, e) in enumerate(zip(mine, rounded, exact, strict=True)):
        assert_within_rule(f"tensor {position}", m, r, e)


@pytest.mark.parametrize("shape", STAGES[:4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_the_modulator_have_pytorchs_bits(shape, dtype):
    dout, q, *_ = packed(shape, dtype)
    dmodulator, total = torch.ops.focalnet.cuda_modulate_bwd(dout, q, True)
    assert torch.equal(dmodulator, dout * q)
    exact = (dout.double() * q.double()).sum((0, 1, 2))
    assert_within_rule("sum", total, (dout * q).sum((0, 1, 2)), exact)
    torch.ops.focalnet.cuda_modulate(dmodulator, q, dmodulator)
    assert torch.equal(dmodulator, dout * q * q)


@pytest.mark.parametrize("change", ["transposed", "expanded", "channels apart"])
def test_factors_may_have_any_strides(change):
    dout, q, *_ = packed(Shape(2, 6, 5, 24, (3, 5)), torch.bfloat16)
    dout = {
        "transposed": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": dout[:1, :1, :1, :1].expand(dout.shape),
        "channels apart": torch.stack([dout, dout], -1)[..., 0],
    }[change]
    dmodulator, _ = torch.ops.focalnet.cuda_modulate_bwd(dout, q, False)
    assert torch.equal(dmodulator, dout * q)


BAD = {
    "factor has shape (2, 6, 5, 23); expected that of modulator": lambda m, q: (m, q[..., :-1], m),
    "factor has dtype": lambda m, q: (m, q.float(), m),
    "factor is not on modulator's device": lambda m, q: (m, q.cpu(), m),
    "modulator has dtype Double": lambda m, q: (m.double(), q.double(), m.double()),
    "out has strides": lambda m, q: (m, q, m.transpose(1, 2).contiguous().transpose(1, 2)),
    "out has shape": lambda m, q: (m, q, m[0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_factors_are_named(message):
    modulator, q, *_ = packed(Shape(2, 6, 5, 24, (3, 5)), torch.bfloat16)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.focalnet.cuda_modulate(*BAD[message](modulator, q))


def test_bad_outputs_of_the_aggregations_gradients_are_named():
    dagg, _, ctx, gates, focal_weights, *_ = packed(Shape(2, 6, 5, 24, (3, 5)), torch.bfloat16)
    arguments = dagg, ctx, gates, focal_weights, False, True
    for mask, outputs, message in (
        (
            [False, True, False, True],
            (torch.empty_like(dagg), None),
            "dctx is given, but output_mask does not ask for it",
        ),
        ([True] * 4, (dagg[..., 1:], None), "dctx has shape (2, 6, 5, 23); expected (2, 6, 5, 24)"),
        ([True] * 4, (None, gates.transpose(1, 2).contiguous().transpose(1, 2)), "dgates has strides"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.focalnet.cuda_gated_aggregation_bwd(*arguments, mask, *outputs)


@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_nothing_waits_for_the_device(shape):
    arguments = on_device(shape)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_a_captured_graph_gives_the_same_bits(shape):
    arguments = on_device(shape)
    expected = call(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_runs_on_the_current_stream():
    arguments = on_device(Shape(8, 56, 56, 96, (3, 5, 7)))
    expected = call(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mine = call(*arguments)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.slow
def test_tensors_of_more_than_two_to_the_31_elements():
    needed = 20 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    shape = Shape(5400, 64, 64, 98, (3,))
    ctx = torch.zeros(shape.batch, 64, 64, 98, dtype=torch.bfloat16, device="cuda")
    ctx[-1] = torch.randn(64, 64, 98, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    gates = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16, device="cuda").expand(shape.batch, 64, 64, 2)
    weights = [torch.randn(98, 1, 3, 3, device="cuda").to(torch.bfloat16)]
    agg = cuda.gated_aggregation(ctx, gates, weights, False)
    last = cuda.gated_aggregation(ctx[-1:].clone(), gates[-1:], weights, False)
    assert torch.equal(agg[-1:], last)
    assert not agg[:-1].any()

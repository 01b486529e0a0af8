"""Every backend that can run here gives the specification's numbers, to the precision that can be asked of it.

The rule: an error against float64 is right when it is at most twice that of the reference in the same precision, plus
one unit in the last place of the largest value.
"""

import pytest
import torch
from operands import SHAPES, Shape, operands

import focalnet
from focalnet import reference
from focalnet.backends import registry
from focalnet.backends.problem import Problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAN_RUN = [name for name, reason in focalnet.backends().items() if reason is None]
# Where a backend runs; the reference would on either.
DEVICE = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu", "reference": "cpu"}

each_backend = pytest.mark.parametrize("backend", CAN_RUN)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def takes(backend, shape, dtype):
    """Whether the backend takes the call; that it says so in words where it does not is tested below."""
    _, ctx, _, focal_weights, *_ = operands(shape, dtype, DEVICE[backend])
    kernel_sizes = tuple(tuple(weight.shape[2:]) for weight in focal_weights)
    problem = Problem("focal_modulation", ctx.device, ctx.dtype, *ctx.shape, kernel_sizes)
    return registry._REGISTRY[backend].why_not(problem) is None


def outputs_and_gradients(shape, dtype, backend, exact_of=None):
    """out, then the gradients of all arguments; the values are those that ``dtype`` can hold, in every dtype."""
    *images, focal_weights, weight, bias = operands(shape, exact_of or dtype)
    device = DEVICE[backend]
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in (*images, *focal_weights, weight)]
    if bias is not None:
        leaves.append(bias.detach().to(device, dtype).requires_grad_())
    q, ctx, gates, *rest = leaves
    levels = len(focal_weights)
    out = focalnet.focal_modulation(
        q, ctx, gates, rest[:levels], *rest[levels:], normalize_modulator=shape.normalize, backend=backend
    )
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, dout.to(exact_of or dtype).to(device, dtype))
    return [tensor.cpu() for tensor in (out, *gradients)]


def assert_at_most_twice_the_references_error(shape, dtype, backend):
    exact = outputs_and_gradients(shape, torch.float64, "reference", exact_of=dtype)
    rounded = outputs_and_gradients(shape, dtype, "reference")
    mine = outputs_and_gradients(shape, dtype, backend)
    for position, (m, r, e) in enumerate(zip(mine, rounded, exact, strict=True)):
        assert m.dtype == dtype and m.shape == e.shape
        if not e.numel():
            continue
        ulp = torch.finfo(dtype).eps * e.abs().max()
        assert (m - e).abs().max() <= 2 * (r - e).abs().max() + ulp, f"tensor {position}"


@each_shape
@each_dtype
@each_backend
def test_outputs_and_gradients_obey_the_rule(shape, dtype, backend):
    if not takes(backend, shape, dtype):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run focal_modulation here: .*{dtype}"):
            focalnet.focal_modulation(*operands(shape, dtype, DEVICE[backend]), backend=backend)
        return
    assert_at_most_twice_the_references_error(shape, dtype, backend)


@each_backend
@pytest.mark.parametrize("channels", [32, 96, 100, 128])
@pytest.mark.parametrize("kernels", [(3, 5, 7), (5, 7, 9), (3, 5, 7, 9), (11, 13, 15)], ids=str)
def test_published_kernels_and_widths_obey_the_rule(channels, kernels, backend):
    assert_at_most_twice_the_references_error(Shape(2, 14, 11, channels, kernels), torch.float32, backend)


@each_backend
def test_the_same_numbers_run_after_run_under_deterministic_algorithms(backend):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_gradients(Shape(3, 14, 14, 40, (3, 5)), torch.float32, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(backend, requires_grad):
    q, ctx, gates, focal_weights, weight, bias = (
        [t.detach().clone().requires_grad_(requires_grad) for t in a]
        if isinstance(a, list)
        else a.detach().clone().requires_grad_(requires_grad)
        for a in operands(Shape(channels=16), device=DEVICE[backend])
    )
    torch.library.opcheck(
        torch.ops.focalnet.focal_modulation, (q, ctx, gates, focal_weights, weight, bias, True, backend)
    )
    torch.library.opcheck(torch.ops.focalnet.gated_aggregation, (ctx, gates, focal_weights, True, backend))


@each_backend
def test_inputs_are_left_as_they_were(backend):
    arguments = operands(Shape(channels=16), device=DEVICE[backend])
    before = [[t.clone() for t in a] if isinstance(a, list) else a.clone() for a in arguments]
    focalnet.focal_modulation(*arguments, backend=backend)
    for now, then in zip(arguments, before, strict=True):
        for a, b in zip(now, then, strict=True) if isinstance(now, list) else [(now, then)]:
            assert torch.equal(a, b)


def test_the_reference_takes_whatever_no_other_backend_takes():
    arguments = operands(Shape(), torch.float64)
    torch.testing.assert_close(
        focalnet.focal_modulation(*arguments),
        reference.focal_modulation(*arguments),
        rtol=0,
        atol=0,
    )

"""The Triton kernels in the tiles of the table, not in small ones: streaming over rows, several tiles of columns.

On a GPU also at the sizes of real stages, under capture, on a side stream, and where waiting is an error.
"""

import pytest
import torch
from operands import Shape, operands

import focalnet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

# More than 16 rows: not the whole-plane path. More than one tile of 32 columns, and a last one that is not full.
STREAMED = [Shape(1, 18, 50, 16, (3, 5)), Shape(1, 17, 20, 16, (3,))]
STAGES = [
    Shape(2, 56, 56, 96, (3, 5, 7)),
    Shape(2, 28, 28, 192, (3, 5, 7)),
    Shape(2, 14, 14, 384, (3, 5, 7)),
    Shape(2, 7, 7, 768, (3, 5, 7)),
    Shape(1, 96, 96, 192, (5, 7, 9)),
]


def results(shape, dtype, backend):
    """out, then the gradients of all arguments, in float64 on the CPU."""
    q, ctx, gates, focal_weights, weight, bias = operands(shape, torch.float64)
    # Rounded to float32 first: what is exact must be the same numbers that are rounded further.
    leaves = [t.float().to(DEVICE, dtype).requires_grad_() for t in (q, ctx, gates, weight, bias, *focal_weights)]
    q, ctx, gates, weight, bias, *focal_weights = leaves
    out = focalnet.focal_modulation(q, ctx, gates, focal_weights, weight, bias, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, dout.to(DEVICE, dtype))
    return [t.detach().double().cpu() for t in (out, *gradients)]


def assert_obeys_the_rule(shape, dtype):
    # cuDNN would choose kernels for seconds, and round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=False):
        exact = results(shape, torch.float64, "reference")
        rounded = results(shape, dtype, "reference")
    mine = results(shape, dtype, "triton")
    for position, (m, r, e) in enumerate(zip(mine, rounded, exact, strict=True)):
        ulp = torch.finfo(dtype).eps * e.abs().max()
        assert (m - e).abs().max() <= 2 * (r - e).abs().max() + ulp, f"tensor {position}"


@pytest.mark.slow
@pytest.mark.parametrize("shape", STREAMED, ids=str)
def test_maps_that_are_streamed_obey_the_rule(shape):
    assert_obeys_the_rule(shape, torch.float32)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_real_stages_obey_the_rule(shape, dtype):
    assert_obeys_the_rule(shape, dtype)


def _on_device(shape=STAGES[0]):
    with torch.no_grad():
        q, ctx, gates, focal_weights, weight, bias = operands(shape, torch.bfloat16, "cuda")
    return lambda: focalnet.focal_modulation(q, ctx, gates, focal_weights, weight, bias, backend="triton")


@on_gpu
@pytest.mark.gpu
def test_a_captured_call_gives_the_same_bits_when_it_is_replayed():
    call = _on_device()
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@on_gpu
@pytest.mark.gpu
def test_a_call_runs_on_the_current_stream():
    call = _on_device()
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call()
    stream.synchronize()
    assert torch.equal(found, expected)


@on_gpu
@pytest.mark.gpu
def test_a_call_that_was_made_before_does_not_wait_for_the_device():
    call = _on_device()
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The order of threads and blocks does not matter, thanks to barriers whose absence is seen."""

import shutil

import pytest
import torch
from cuda_program import SM_90, Device, barrier_at
from cuda_rule import DTYPES, ONE, SMALL, check_forward, gradient_of
from operands import Shape, operands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


@pytest.mark.parametrize(("dtype", "tensor_cores"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(run, dtype, tensor_cores):
    _, ctx, gates, focal_weights, *_ = operands(Shape(2, 17, 20, 20, (3, 5)), dtype)
    dagg = gradient_of(ctx, dtype)
    devices = [SM_90, Device(64, 100, 1), Device(32, 48, 4)] if tensor_cores else [SMALL]
    for options in ({"device": device} | more for device in devices for more in ({}, {"dagg": dagg})):
        options |= {"tensor_cores": tensor_cores}
        (_, first), (_, second) = (run(ctx, gates, focal_weights, False, seed=seed, **options) for seed in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
def test_a_barrier_that_is_missing_is_seen(run, barrier):
    """Without one of the barriers the numbers are wrong: the tests of the rule would fail."""
    source, line = BARRIERS[barrier]
    tensor_cores = source.startswith("toeplitz_fwd")
    kernels = (3, 5, 11) if source == "toeplitz_fwd.cu" else (3, 5, 7)
    shape, dtype = Shape(4, 14, 14, 32, kernels), DTYPES[tensor_cores]
    check_forward(run, shape, dtype, ONE, tensor_cores=tensor_cores)
    with pytest.raises(AssertionError, match="agg"):
        check_forward(run, shape, dtype, ONE, tensor_cores=tensor_cores, without=barrier_at(source, line))

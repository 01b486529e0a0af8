"""The backend `cuda` says in words what it does not take; what it takes is tested in test_cuda_kernels.py."""

import re

import pytest
import torch
from cuda_program import CUDA

from focalnet.backends import cuda
from focalnet.backends.problem import Problem

PROBLEM = Problem("focal_modulation", torch.device("cuda", 0), torch.bfloat16, 2, 14, 14, 96, ((3, 3), (5, 5)))


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))


def test_takes_every_published_kernel_dtype_and_width():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kernels in (((3, 3), (5, 5)), ((3, 3), (5, 5), (7, 7), (9, 9)), ((11, 11), (13, 13), (15, 15))):
            for channels in (1, 96, 100, 352):
                problem = PROBLEM._replace(dtype=dtype, kernel_sizes=kernels, channels=channels)
                assert cuda.why_not(problem) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "the tensors are on cpu, not on a CUDA device"),
        ({"dtype": torch.float64}, "torch.float64 is not one of torch.float32, torch.bfloat16, torch.float16"),
        ({"kernel_sizes": ((3, 3),) * 9}, "9 focal levels are more than 8"),
        ({"kernel_sizes": ((3, 33),)}, "a focal kernel is 33 wide, more than 31"),
        ({"height": 2**16, "width": 2**15}, "a map of 65536 x 32768 has 2^31 positions or more"),
    ],
    ids=["device", "dtype", "levels", "kernel", "positions"],
)
def test_refuses_in_words(change, reason):
    assert cuda.why_not(PROBLEM._replace(**change)) == reason


def test_refuses_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda device: (7, 5))
    assert cuda.why_not(PROBLEM) == "cuda:0 has compute capability 7.5, less than 8.0"


def test_limits_are_those_of_the_kernels():
    header = (CUDA / "gated_aggregation.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"constexpr int (kMax\w+) = (\d+);", header)}
    del limits["kMaxColumns"]  # of a focal kernel that a thread takes at once, not of a call
    assert limits == {"kMaxLevels": cuda.MAX_LEVELS, "kMaxKernel": cuda.MAX_KERNEL}
    header = (CUDA / "toeplitz.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"constexpr int (kMax\w+) = (\d+);", header)}
    del limits["kMaxToeplitzBackwardThreads"]  # of a block, not of a call
    assert limits == {"kMaxToeplitzKernel": cuda.MAX_TOEPLITZ_KERNEL, "kMaxToeplitzReach": cuda.MAX_TOEPLITZ_REACH}


def test_sixteen_bit_types_run_on_tensor_cores_with_every_published_kernel():
    for dtype in (torch.bfloat16, torch.float16):
        for kernels in (((3, 3), (5, 5)), ((3, 3), (5, 5), (7, 7), (9, 9)), ((11, 11), (13, 13), (15, 15))):
            assert cuda.why_not_tensor_cores(PROBLEM._replace(dtype=dtype, kernel_sizes=kernels)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32 has no exact products on tensor cores; bfloat16 and float16 have"),
        ({"kernel_sizes": ((3, 3), (1, 17))}, "a focal kernel is 17 wide, more than 15"),
        ({"kernel_sizes": ((1, 13),) * 5}, "the focal levels reach 30 positions in all, more than 24"),
    ],
    ids=["dtype", "kernel", "reach"],
)
def test_says_why_a_call_runs_on_multiply_adds(change, reason):
    assert cuda.why_not_tensor_cores(PROBLEM._replace(**change)) == reason


def test_an_older_gpu_has_no_bfloat16_on_tensor_cores(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda device: (7, 5))
    assert cuda.why_not_tensor_cores(PROBLEM) == "cuda:0 has compute capability 7.5, less than 8.0"

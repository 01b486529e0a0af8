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

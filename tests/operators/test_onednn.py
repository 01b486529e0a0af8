"""Convolutions that oneDNN never returns from are gone around, wherever a modulation could meet them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wide_kernels import CASES, name_of

from focalnet import onednn

SCRIPT = Path(__file__).parents[1] / "helpers" / "wide_kernels.py"
SECONDS = 240


@pytest.fixture(scope="module")
def returned():
    """Way -> the errors that it printed; the script is ended after SECONDS."""
    try:
        done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=SECONDS, check=True)
        output = done.stdout
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode()
    lines = (line.split("; ") for line in output.splitlines())
    return {name: (float(ours), float(theirs)) for name, ours, theirs in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_wide_kernels_return_in_bfloat16_and_are_as_exact_as_in_nchw(case, returned):
    assert name_of(case) in returned, f"no answer in {SECONDS} s"
    ours, theirs = returned[name_of(case)]
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [13, 15])
def test_other_convolutions_are_pytorchs_own(dtype, width):
    x, weight = torch.randn(1, 3, 4, 20, dtype=dtype), torch.randn(3, 1, 1, width, dtype=dtype)
    ours = onednn.conv2d(x, weight, padding=(0, width // 2), groups=3)
    expected = torch.nn.functional.conv2d(x, weight, padding=(0, width // 2), groups=3)
    assert ours.dtype == dtype
    if onednn.may_hang(x.device, dtype, width):
        torch.testing.assert_close(ours, expected)
    else:
        assert torch.equal(ours, expected)

"""The size of a core's L2, which bounds the scratch of a thread."""

from pathlib import Path

import pytest
import torch
from block_layers import make_layer, weights
from instruction_sets import OPS, require, threads

from focalnet.backends.cpu import has_dot_products

require("cpu_l2_bytes")
SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def block(dtype):
    return [OPS.cpu_block(torch.randn(2, 30, 31, 40).to(dtype), *weights(make_layer(40).to(dtype))[:-2])]


def patch_embed(dtype):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((2, 64, 62, 3), (40, 3, 2, 2), (40,)))
    return [OPS.cpu_patch_embed(x, weight, bias, [2, 2], [0, 0], [32, 31], None, None, 1e-5)]


def linear(dtype):
    x, weight, dy = (torch.randn(s).to(dtype) for s in ((1000, 96), (196, 96), (1000, 196)))
    return [OPS.cpu_linear_fwd(x, weight, None), *OPS.cpu_linear_bwd(dy, x, weight, True, True)]


def mlp(dtype):
    x, weight1, weight2, dy = (torch.randn(s).to(dtype) for s in ((1000, 32), (128, 32), (48, 128), (1000, 48)))
    y, fc1 = OPS.cpu_mlp_fwd(x, weight1, None, weight2, None)
    return [y, *OPS.cpu_mlp_bwd(dy, x, fc1, weight1, weight2, True, True, True)]


@pytest.fixture(params=["emulated", "best"])
def isa(request):
    before = OPS.cpu_isa()
    if request.param == "emulated":
        OPS.cpu_set_isa("emulated")
    yield request.param
    OPS.cpu_set_isa(before)


@pytest.mark.skipif(not SIZE.exists(), reason=f"no {SIZE} here")
def test_the_size_is_what_the_system_says():
    assert OPS.cpu_l2_bytes() == int(SIZE.read_text().strip().removesuffix("K")) * 1024


@pytest.mark.parametrize("run", [block, patch_embed, linear, mlp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_size(isa, run, dtype):
    """From blocks of the fewest rows to those of a large L2."""
    if run in (linear, mlp) and dtype == torch.bfloat16 and not has_dot_products():
        pytest.skip(f"{OPS.cpu_isa()} has no products of bfloat16")
    results, before = [], OPS.cpu_l2_bytes()
    for size in (1, 128 * 1024, 256 * 1024, 512 * 1024):
        OPS.cpu_set_l2_bytes(size)
        try:
            with threads(2):
                torch.manual_seed(0)
                results.append(run(dtype))
        finally:
            OPS.cpu_set_l2_bytes(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_size_must_be_positive():
    with pytest.raises(RuntimeError, match="bytes is 0; expected the size of an L2"):
        OPS.cpu_set_l2_bytes(0)

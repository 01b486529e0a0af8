"""The extension's own threads, and the operators of the head, which use them: norm_mean and linear."""

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from block_layers import make_layer, weights
from instruction_sets import OPS, product_isa, require, threads  # noqa: F401
from torch import nn
from torch.utils.cpp_extension import include_paths, library_paths

from focalnet import FocalNetConfig, FocalNetForImageClassification

require("cpu_linear")
SMALL = {"embed_dim": 16, "depths": [1, 2], "focal_levels": [2, 1], "focal_windows": [3, 3], "image_size": 64}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def classifier():
    torch.manual_seed(0)
    return FocalNetForImageClassification(FocalNetConfig(**SMALL, num_labels=7)).eval()


def logits(model, images):
    with torch.inference_mode():
        return model(images).logits


def block(x, layer, own_threads):
    return OPS.cpu_block(x, *weights(layer)[:-2], own_threads)


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [(0, 4, 4, 16), (1, 7, 7, 40), (3, 14, 13, 40), (2, 30, 31, 24)], ids=str)
def test_a_block_has_the_same_bits_on_either_kind_of_threads(shape, count, dtype):
    layer, x = make_layer(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    with threads(count):
        assert torch.equal(block(x, layer, own_threads=True), block(x, layer, own_threads=False))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_many_callers_at_a_time_share_the_helpers(count):
    model = classifier()
    images = [torch.randn(1 + i % 3, 3, 64, 64) for i in range(6)]
    expected = [logits(model, x) for x in images]
    wrong = []

    def serve(x, y):
        for _ in range(30):
            if not torch.equal(logits(model, x), y):
                wrong.append(x.shape)

    with threads(count):
        servers = [threading.Thread(target=serve, args=pair) for pair in zip(images, expected, strict=True)]
        for server in servers:
            server.start()
        for server in servers:
            server.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_made_by_fork_after_a_warm_up_runs_on_threads_of_its_own():
    model, images = classifier(), torch.randn(2, 3, 64, 64)
    with threads(2):
        expected = logits(model, images)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(logits(model, images), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_more_threads_are_started_than_pytorch_is_told_to_use():
    layer, x = make_layer(40), torch.randn(2, 14, 14, 40)
    started = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731
    with threads(7):
        block(x, layer, own_threads=True)
    before = started()
    for count in (1, 3, 7):
        with threads(count):
            block(x, layer, own_threads=True)
    assert started() == before


# ---- the head -------------------------------------------------------------------------------------------------------


def check(ours, reference, exact):
    """The error against float64 is at most twice the reference's, plus one unit in the last place of the largest."""
    assert ours.shape == exact.shape and ours.dtype == reference.dtype
    if ours.numel():
        ulp = torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * (reference.double() - exact).abs().max() + ulp


@DTYPES
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(0, 2, 2, 8), (1, 1, 1, 5), (2, 7, 7, 768), (3, 25, 42, 65)], ids=str)
def test_norm_and_mean(product_isa, shape, affine, dtype):
    norm = nn.LayerNorm(shape[-1], elementwise_affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm, x = norm.to(dtype), torch.randn(shape).to(dtype)
    tokens, mean = OPS.cpu_norm_mean(x, norm.weight, norm.bias, norm.eps)
    exact = norm.double()(x.double()).flatten(1, 2)
    reference = norm.to(dtype)(x).flatten(1, 2)
    check(tokens, reference, exact)
    check(mean, reference.mean(1), exact.mean(1))


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("size", [(0, 8, 4), (1, 768, 1000), (5, 33, 17), (64, 16, 1), (3, 1, 40)], ids=str)
def test_linear(product_isa, size, bias, dtype):
    rows, features, labels = size
    layer, x = nn.Linear(features, labels, bias=bias).to(dtype), torch.randn(rows, features).to(dtype)
    ours = OPS.cpu_linear(x, layer.weight, layer.bias)
    reference = layer(x)
    check(ours, reference, layer.double()(x.double()))


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("cpu_linear", (torch.ones(2, 3), torch.ones(4, 5), None), r"input has shape \(2, 3\); expected \(B, 5\)"),
        ("cpu_linear", (torch.ones(2, 3).bfloat16(), torch.ones(4, 3), None), "input has dtype bfloat16 and the"),
        ("cpu_norm_mean", (torch.ones(2, 3), None, None, 1e-5), r"hidden_state has shape \(2, 3\)"),
        ("cpu_norm_mean", (torch.ones(1, 2, 2, 3), torch.ones(4), None, 1e-5), "norm_weight has shape"),
    ],
)
def test_bad_arguments_are_named(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, operator)(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="the program is linked as on Linux")
def test_the_caller_learns_that_memory_ran_out_in_any_thread(tmp_path):
    program, kernels = tmp_path / "threads", Path(__file__).parents[2] / "csrc" / "cpu"
    flags = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{kernels}", f"-I{kernels.parent}"]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    sources = [str(Path(__file__).with_name("threads_program.cpp")), str(kernels / "threads.cpp")]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-pthread"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *flags, *sources, "-o", str(program), *libraries], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["50", "50"]

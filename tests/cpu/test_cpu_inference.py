"""Bounds of inference on a CPU that hold for a whole model: threads, memory. test_counters.py has the traffic."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import require, threads

import focalnet

require("cpu_patch_embed")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig.from_variant("tiny_lrf")).eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_models_bits_do_not_depend_on_threads(tiny, batch):
    x = torch.randn(batch, 3, 97, 128)
    with torch.inference_mode():
        expected = tiny(x).logits
        for n in (1, 2, 4):
            with threads(n):
                assert torch.equal(tiny(x).logits, expected), n


COUNTS_ITS_THREADS = """
import os, torch, focalnet
model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig(embed_dim=16, depths=[1, 1, 1, 1])).eval()
x, before = torch.randn(1, 3, 64, 64), len(os.listdir("/proc/self/task"))
with torch.inference_mode():
    for given in (1, 2, 4):
        torch.set_num_threads(given)
        model(x)
        print(given, len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture(scope="module")
def started():
    """Threads that torch was given -> threads beside the main one, counted in one process, from few to many."""
    lines = output_of([sys.executable, "-c", COUNTS_ITS_THREADS]).splitlines()
    return dict(tuple(map(int, line.split())) for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize("given", [1, 2, 4])
def test_inference_starts_as_many_threads_as_torch_was_given(given, started):
    assert started[given] == given - 1


reads_resident = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc"
)


# In a process of its own: what tests before have freed, the allocator may give back or take again at any moment.
MEASURES_MEMORY = """
import gc, os, torch, focalnet
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

torch.manual_seed(0)
"""
THE_FIRST_CALL = """
model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig.from_variant("tiny_lrf")).eval()
x = torch.randn(1, 3, 224, 224)
with torch.inference_mode():
    before = resident()
    model(x)
print(sum(parameter.nbytes for parameter in model.parameters()), resident() - before)
"""
A_THOUSAND_CALLS = """
model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig(embed_dim=8, depths=[1, 2, 1, 1])).eval()
x = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    for _ in range(100):
        model(x)
    gc.collect()
    before = tensors(), resident()
    for _ in range(1000):
        model(x)
    gc.collect()
    print(tensors() - before[0], resident() - before[1])
"""


def numbers_of(program):
    return map(int, output_of([sys.executable, "-c", MEASURES_MEMORY + program]).split())


def output_of(command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.slow
@reads_resident
def test_the_first_call_needs_no_copy_of_the_weights():
    """What it adds to FocalNet-T LRF's 114 MB: one block's packed weights (2 MB), projection and aggregate of the
    largest map (4 MB), maps (1 MB each), threads' scratch, code that was not touched before."""
    weights, more = numbers_of(THE_FIRST_CALL)
    assert more < weights / 3


@pytest.mark.slow
@reads_resident
def test_a_thousand_calls_need_no_more_memory():
    """One lost result a call would be 1000 x 5 KB (logits and maps), one lost copy of weights far more."""
    tensors, more = numbers_of(A_THOUSAND_CALLS)
    assert tensors == 0
    assert more < 2e6

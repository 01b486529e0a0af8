"""How the memory of a runtime is measured, and what a model in bfloat16 takes of it."""

import subprocess
import sys

import pytest

from focalnet.backends import extension
from focalnet.benchmark import memory
from focalnet.benchmark.runtimes import Case
from focalnet.benchmark.turns import Runtime

needs_record = pytest.mark.skipif(
    not memory.CLEAR_REFS.exists(), reason="the system keeps no record of a peak that can be restarted"
)

# 60 MB that are gone before the watch begins, then 20 MB that stay and 30 MB that do not. mmap gives memory back.
PROGRAM = """
import mmap
from focalnet.benchmark.memory import Peak

def filled(megabytes):
    block = mmap.mmap(-1, megabytes << 20)
    block.write(b"1" * len(block))
    return block

filled(60).close()
peak = Peak()
kept = filled(20)
filled(30).close()
print(peak.of_process() >> 20, peak.since() >> 20)
"""


@needs_record
def test_what_came_before_counts_for_the_process_alone():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    of_process, since = map(int, result.stdout.split())
    # The bytes that are written into a block are as large as the block.
    assert of_process > 120 and 50 <= since <= 85


def of_model(dtype):
    """The memory of one process. A busy machine only adds to it: pages that come early, and larger ones."""
    runtime = Runtime("focalnet", Case("tiny_lrf", 224, 8, dtype=dtype))
    runtime.end()
    print(dtype, f"{runtime.model_bytes / 1e6:.0f} MB")
    return runtime.model_bytes


@needs_record
@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_inference_in_bfloat16_takes_at_most_three_fifths_of_float32s_memory():
    """Weights, scratch and maps together: the peaks of processes that build FocalNet-T and run it at batch 8.

    The least of three in float32 and of as many in bfloat16, of which one that is small enough decides.
    """
    in_float32 = min(of_model("float32") for _ in range(3))
    assert in_float32 > 114e6, "the weights alone"
    assert any(of_model("bfloat16") <= 0.6 * in_float32 for _ in range(3))

"""What the CUDA kernels take on six architectures: no spills, and registers that leave room for the planned warps.

The rows are committed; bench/static/ptxas.py makes them. Their digests hold them to the sources, and what nvcc reports
for one architecture, where there is nvcc, must be what they say.
"""

import shutil

import ptxas
import pytest
from kernel_names import names, written

SHARED_LIMIT = 48 * 2**10  # bytes of static shared memory, on every architecture
# 512 threads of a block; two blocks of 256, or one.
MAX_REGISTERS = {
    "toeplitz_fwd": 128,
    "toeplitz_fwd_planes": 255,
    "toeplitz_bwd": 128,
    "toeplitz_bwd_levels": 128,
    "toeplitz_turn": 64,
}
# Bytes a thread: on consumer GPUs of the Blackwell generation one instance of a kernel lacks one register.
SPILLED = {("toeplitz_bwd_kernel<float16, 4>", "sm_120"): {"stack": 8, "spill_stores": 4, "spill_loads": 8}}
NOTHING = {"stack": 0, "spill_stores": 0, "spill_loads": 0}
RESULTS = ("registers", "stack", "spill_stores", "spill_loads", "static_shared")
every_source = pytest.mark.parametrize("source", ptxas.SOURCES, ids=lambda path: path.stem)


def committed(source, architecture=None):
    wanted = [row for row in ptxas.rows() if row["source"] == source.stem]
    return [row for row in wanted if architecture is None or row["architecture"] == f"sm_{architecture}"]


@every_source
@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
def test_every_kernel_has_rows_of_its_source_as_it_is(source, architecture):
    rows = committed(source, architecture)
    assert names(rows) == written(source)
    assert all(map(ptxas.is_fresh, rows)), "run bench/static/ptxas.py"


@every_source
def test_no_kernel_spills(source):
    for row in committed(source):
        spilled = SPILLED.get((row["kernel"], row["architecture"]), NOTHING)
        assert {name: row[name] for name in NOTHING} == spilled, row
        assert row["static_shared"] <= SHARED_LIMIT, row
        assert row["registers"] <= MAX_REGISTERS.get(source.stem, 255), row


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@every_source
def test_nvcc_reports_what_the_rows_say(source):
    """Another release may take other registers, but spills nothing either."""
    here, there = ptxas.rows_of(source, 90, ptxas.release_of()), committed(source, 90)
    if here[0]["nvcc"] == there[0]["nvcc"]:
        assert by_kernel(here, RESULTS) == by_kernel(there, RESULTS)
    assert by_kernel(here, NOTHING) == {row["kernel"]: [0, 0, 0] for row in there}


def by_kernel(rows, fields):
    return {row["kernel"]: [row[field] for field in fields] for row in rows}

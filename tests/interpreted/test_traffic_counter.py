"""The traffic counter on kernels whose traffic is known."""

import pytest
import torch
from toy_kernels import reverse_twice_kernel, shared_output_kernel, sum_neighbours_kernel
from traffic import Counter


def _reverse_twice(counter, elements, block, barrier=True):
    x, scratch, y = torch.randn(elements), torch.empty(elements), torch.empty(elements)
    with counter.watching():
        reverse_twice_kernel[(-(-elements // block),)](x, scratch, y, elements, BLOCK=block, BARRIER=barrier)
    return x, y


def test_masked_elements_are_not_counted_and_the_result_stays_right():
    counter = Counter()
    x, y = _reverse_twice(counter, 1000, 128)
    assert torch.equal(y, 2 * x)
    assert counter.loaded("x") == counter.loaded("scratch") == counter.stored("scratch") == counter.stored("y") == 4000


def test_a_program_pays_once_for_what_it_loads_twice_and_every_program_pays():
    x, y, counter = torch.randn(1024), torch.empty(1024), Counter()
    with counter.watching():
        sum_neighbours_kernel[(4,)](x, y, 1024, BLOCK=256)
    # 256 elements each, and the one after them for all but the last program.
    assert counter.loaded("x") == 4 * (1024 + 3)
    assert counter.launches[0].loaded_sectors["x"] == 4 * 1024 + 3 * 32


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_a_sample_of_the_programs_is_scaled_to_the_grid(programs):
    x, y, counter = torch.randn(8193), torch.empty(8192), Counter(programs=programs)
    with counter.watching():
        sum_neighbours_kernel[(32,)](x, y, 10**9, BLOCK=256)
    (launch,) = counter.launches
    assert (launch.programs, launch.sampled) == (32, programs)
    assert launch.stored["y"] == 4 * 8192
    assert launch.loaded["x"] == 4 * (8192 + 32)


def test_views_of_one_storage_are_one_storage():
    packed, counter = torch.randn(2048), Counter()
    counter = Counter({"packed": packed})
    with counter.watching():
        sum_neighbours_kernel[(1,)](packed[:1024], packed[1024:], 1024, BLOCK=1024)
    assert counter.loaded("packed") == counter.stored("packed") == 4096


def test_a_missing_barrier_is_found():
    found = []
    for barrier in (True, False):
        counter = Counter()
        _reverse_twice(counter, 1000, 128, barrier)
        found.append({str(hazard).partition(": ")[2] for hazard in counter.hazards()})
    assert found == [set(), {"load after store with no barrier between in scratch"}]


def test_programs_that_store_to_one_address_are_found():
    counter = Counter()
    with counter.watching():
        shared_output_kernel[(3,)](torch.empty(1, dtype=torch.int32))
    assert {hazard.kind for hazard in counter.hazards()} == {"store after store by another program"}

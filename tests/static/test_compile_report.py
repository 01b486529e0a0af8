"""The Triton kernels compiled without a GPU: they fit, nothing spills, every barrier stays where it was put.

First the tools, on kernels that are known to fit, to spill, and to need their barrier; then launches that the plans of
published models list. Compiling all of them takes an hour: `bench/static/compile_report.py` does, and its rows are
committed.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from all_launches import DETECTION, DETECTORS, DEVICES, DTYPES, arguments_of, launches, published
from barriers import moved
from bytes_moved import NOWHERE, case_of, plan_of
from compile_report import head_of, source
from compiled import Pointer, Resources, compile_launch, resources
from focalnet.kernels.launch_table import ProductConfig
from focalnet.kernels.plan import RTX_3090, Case, Device
from lowered import digest
from toy_kernels import many_registers_kernel, reverse_twice_kernel, sum_neighbours_kernel

from focalnet.benchmark.floors import OPERATORS, stages
from focalnet.benchmark.rows import key, read

ARCHITECTURES = (80, 90, 100)
FLOATS = Pointer(torch.float32)


def _compile(kernel, arch=90, num_warps=4, **arguments):
    return compile_launch(kernel, arguments, {"num_warps": num_warps, "num_stages": 2}, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_small_kernel_needs_no_local_memory(arch):
    found = resources(_compile(sum_neighbours_kernel, arch, x=FLOATS, y=FLOATS, n=1000, BLOCK=256), arch)
    assert (found.kernel, found.arch, found.local, found.threads) == ("sum_neighbours_kernel", arch, 0, 128)
    assert 0 < found.registers < 64
    assert found.why_not() is None


def test_a_kernel_that_spills_is_found():
    found = resources(_compile(many_registers_kernel, x=FLOATS, y=FLOATS, BLOCK=16384), 90)
    assert "spills" in found.why_not()


def test_a_kernel_with_too_much_shared_memory_is_found():
    fits = Resources("kernel", arch=90, registers=32, local=0, shared=200_000, code=0, threads=128)
    assert fits.why_not() is None
    assert "wants 200000 bytes of shared memory" in replace(fits, arch=80).why_not()


def test_alignment_reaches_the_compiler():
    aligned, odd = (
        _compile(sum_neighbours_kernel, x=Pointer(torch.bfloat16, alignment), y=FLOATS, n=1024, BLOCK=1024)
        for alignment in (16, 2)
    )
    assert "ld.global.v4" in aligned.asm["ptx"]
    assert "ld.global.v4" not in odd.asm["ptx"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_barrier_stays_between_the_store_and_the_load(arch):
    compiled = _compile(
        reverse_twice_kernel, arch, x=FLOATS, scratch=FLOATS, y=FLOATS, n=1000, BLOCK=512, BARRIER=True
    )
    assert moved(compiled) == []


def test_a_barrier_that_compiling_dropped_or_a_load_that_it_moved_is_found():
    compiled = _compile(reverse_twice_kernel, x=FLOATS, scratch=FLOATS, y=FLOATS, n=1000, BLOCK=128, BARRIER=True)
    ptx, lines = compiled.asm["ptx"], compiled.asm["ptx"].splitlines()
    assert ptx.count("bar.sync") == 1
    dropped = SimpleNamespace(asm={**compiled.asm, "ptx": ptx.replace("bar.sync", "nop")})
    (*_, together) = moved(dropped)
    assert together.count("load") == together.count("store") == 2
    assert together.endswith("in the PTX alone")

    (barrier,) = (i for i, line in enumerate(lines) if "bar.sync" in line)
    load = max(i for i, line in enumerate(lines) if "ld.global" in line)
    place = max(i for i in range(load) if ".loc" in lines[i])
    early = [*lines[: barrier - 1], lines[place], lines[load], *lines[barrier - 1 : load], *lines[load + 1 :]]
    swapped = SimpleNamespace(asm={**compiled.asm, "ptx": "\n".join(early)})
    assert moved(swapped) != []


# ---- what makes two sources the same to the report ------------------------------------------------------------------


@triton.jit
def masked_load(pointer, at, end):
    return tl.load(pointer + at, mask=at < end, other=0.0)


def written_in_one_piece():
    @triton.jit
    def kernel(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        one = tl.load(x + at, mask=at < n, other=0.0)
        tl.store(y + at, one + tl.load(x + (at + 1), mask=at + 1 < n, other=0.0), mask=at < n)

    return kernel


def cut_into_functions(step=1):
    step = tl.constexpr(step)

    @triton.jit
    def kernel(x, y, n, BLOCK: tl.constexpr):
        # The same sums, in other words.
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        own = masked_load(x, place, n)
        tl.store(y + place, own + masked_load(x, place + step, n), mask=place < n)

    return kernel


def test_the_digest_tells_another_kernel_from_other_words_for_the_same_one():
    def digest_of(kernel, **options):
        arguments = {"x": FLOATS, "y": FLOATS, "n": 1000, "BLOCK": 256}
        return digest(kernel, arguments, {"num_warps": 4, "num_stages": 2} | options, 90)

    first = digest_of(written_in_one_piece())
    assert digest_of(cut_into_functions()) == first
    assert digest_of(cut_into_functions(step=2)) != first
    assert digest_of(written_in_one_piece(), num_warps=8) != first


# ---- the launches of published models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator, variant, stage, kernel, arch, dtype",
    [
        ("focal_modulation", "tiny_lrf", 0, "gated_aggregation_fwd_kernel", 90, torch.bfloat16),
        ("focal_modulation", "tiny_lrf", 0, "modulator_fwd_kernel", 100, torch.float16),
        ("focal_modulation_bwd", "base_lrf", 1, "gated_aggregation_bwd_kernel", 90, torch.bfloat16),
        ("focal_modulation_bwd", "base_lrf", 1, "modulator_bwd_kernel", 80, torch.bfloat16),
        ("focal_modulation_bwd", "base_lrf", 1, "dweight_kernel", 90, torch.float32),
    ],
)
def test_a_launch_of_a_published_model_fits(operator, variant, stage, kernel, arch, dtype):
    plan = plan_of(operator, case_of(operator, stages(variant)[stage], 128, dtype), DEVICES[arch])
    launch = next(launch for launch in plan.launches if launch.name == kernel)
    compiled = compile_launch(launch.kernel, arguments_of(launch, plan.dtype_of()), launch.options, arch)
    assert resources(compiled, arch).why_not() is None
    assert moved(compiled) == []


@pytest.mark.parametrize("channels", [768, 1024])
@pytest.mark.parametrize("arch", DEVICES)
def test_the_product_that_wants_most_shared_memory_fits_every_architecture(arch, channels):
    """One row of the table wants 112 KB in 16 bit, which sm_86, sm_89 and sm_120 do not have."""
    case = Case.packed(128, 7, 7, channels, (3, 5), torch.bfloat16, has_bias=True)
    plan = plan_of("focal_modulation", case, DEVICES[arch])
    launch = next(launch for launch in plan.launches if launch.name == "modulator_fwd_kernel")
    compiled = compile_launch(launch.kernel, arguments_of(launch, plan.dtype_of()), launch.options, arch)
    assert resources(compiled, arch).why_not() is None


def test_no_product_takes_more_shared_memory_than_its_configuration_says():
    rows = [row for row in read("compiled", NOWHERE) if "BLOCK_K" in row["subject"]]
    assert {row["arch"] for row in rows} == set(DEVICES)
    for row in rows:
        tile = dict(part.split("=") for part in row["subject"].split(", ") if part.startswith("BLOCK"))
        warps, stages = (int(part.split()[0]) for part in row["series"].split(", "))
        config = ProductConfig(*(int(tile[f"BLOCK_{side}"]) for side in "MNK"), warps, stages)
        itemsize = 4 if row["dtype"].startswith("float32") else 2
        assert row["shared"] <= config.shared_bytes(itemsize, row["arch"]), row["subject"]


def test_a_device_has_the_shared_memory_that_its_driver_says(monkeypatch):
    properties = SimpleNamespace(
        major=8, minor=6, multi_processor_count=82, L2_cache_size=6 << 20, shared_memory_per_block_optin=101376
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Device.of(torch.device("cuda")) == RTX_3090
    properties.shared_memory_per_block_optin = 65536
    assert Device.of(torch.device("cuda")).shared_bytes == 65536


def test_no_row_of_the_compile_report_speaks_against_a_configuration():
    rows = read("compiled", NOWHERE)
    assert rows
    assert [row for row in rows if row["against"] or row["local"]] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", DEVICES)
def test_every_configuration_was_compiled_from_the_source_that_is_here(arch, dtype):
    """Fails when a kernel or the table changes and the rows do not: then `bench/static/compile_report.py` is due."""
    found = {key(row): row for row in read("compiled", NOWHERE)}
    for launch, types in launches(arch, (dtype,)).values():
        row = found.get(key(head_of(arch, launch, types)))
        assert row is not None, f"{launch.name}, sm_{arch}, {launch.constexprs}: never compiled"
        assert row["source"] == source(launch), f"{launch.name}, sm_{arch}: compiled from another source"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_scratch_of_every_published_model_holds_what_its_launches_write(operator, arch):
    """Chunks of a call share their scratch, and the last chunk may have another grid than the first."""
    for stage, batch in published():
        plan = plan_of(operator, case_of(operator, stage, batch, torch.bfloat16), DEVICES[arch])
        for launch in plan.launches:
            programs = math.prod(launch.grid)
            for name in ("rings", "packed", "back_rings", "back_packed", "dfocal"):
                if launch.arguments.get(name) == name and launch.name.startswith("gated_aggregation"):
                    assert plan.buffers[name].shape[0] >= programs, (str(stage), batch, launch.name, name)
            if launch.name == "gated_aggregation_fwd_kernel":
                written = launch.arguments["images"] * launch.arguments["bands"] * stage.channels
                assert math.prod(plan.buffers["mean"].shape) >= written, (str(stage), batch)


def test_detection_with_kernels_up_to_fifteen_is_among_the_configurations():
    found = {kernel for name, window in DETECTORS for s in stages(name, DETECTION, window) for kernel in s.kernels}
    assert max(found) == 15


def test_rows_of_an_older_triton_name_it_and_spill_only_where_the_documentation_says():
    """With Triton 3.6 two tiles of the backward spill 8 bytes a thread."""
    rows = read("compiled-triton-3.6", NOWHERE)
    assert {row["triton"] for row in rows} == {"3.6.0"}
    sources = {key(head_of(90, *found)): source(found[0]) for found in launches(90).values()}
    assert all(row["arch"] == 90 and row["source"] == sources[key(row)] for row in rows)
    spilled = [row for row in rows if row["against"]]
    assert {(row["kernel"], row["subject"][:13], row["local"]) for row in spilled} == {
        ("gated_aggregation_bwd_kernel", "KH=(3, 5, 7),", 8),
        ("gated_aggregation_bwd_kernel", "KH=(9, 11, 13", 8),
    }

"""The backend `triton` without a GPU: what its compiled code must have, what it takes, autotuning."""

import importlib.util
import re

import pytest
import torch

import focalnet
from focalnet.backends import triton as triton_backend
from focalnet.backends.problem import Problem

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# ---- what compiled code must have, which a machine without a GPU can read ------------------------------------------


def compiled(launch, dtypes, arch=90):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attrs = launch.ast(dtypes)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


@needs_triton
@pytest.mark.parametrize("whole_plane", [False, True], ids=["streaming", "whole planes"])
def test_a_barrier_stands_between_what_a_level_writes_and_the_next_one_reads(whole_plane):
    from focalnet.kernels import gated_aggregation
    from focalnet.kernels.launch_table import LevelConfig
    from focalnet.kernels.plan import H100, Case

    case = Case.packed(128, 14, 14, 96, (3, 3), torch.bfloat16)
    plan = gated_aggregation.forward_plan(case, H100, LevelConfig(16, 32, rows=4, whole_plane=whole_plane))
    kernel = compiled(plan.launches[0], plan.dtype_of())
    # In the order of the program: the loads of a level, its stores, the barrier.
    operations = re.findall(r"tt\.load|tt\.store|gpu\.barrier|ttg\.barrier", kernel.asm["ttgir"])
    sections = " ".join(operations).replace("gpu.barrier", "|").replace("ttg.barrier", "|").split("|")
    packing, first, second, _ = (section.split() for section in sections)
    for section in (packing, first, second):
        assert section and section[0] == "tt.load" and section[-1] == "tt.store"
    assert kernel.asm["ptx"].count("bar.sync") >= 3


@needs_triton
@pytest.mark.parametrize("arch, product", [(80, "tt.dot "), (90, "ttng.warp_group_dot "), (100, "ttng.tc_gen5_mma ")])
@pytest.mark.parametrize("kernel", ["modulator_fwd_kernel", "dagg_kernel"])
def test_the_walk_over_tiles_and_steps_of_a_product_is_one_pipelined_loop(kernel, arch, product):
    """The tensor cores work on what was copied to shared memory some steps, or a tile, before."""
    from focalnet.kernels import focal_modulation
    from focalnet.kernels.plan import H100, Case

    case = Case.packed(128, 14, 14, 512, (3,), torch.bfloat16, has_bias=True, mask=(True,) * 6)
    make = focal_modulation.backward_plan if kernel == "dagg_kernel" else focal_modulation.forward_plan
    plan = make(case, H100)
    launch = next(launch for launch in plan.launches if launch.name == kernel)
    ttgir = compiled(launch, plan.dtype_of(), arch).asm["ttgir"]
    assert ttgir.count("scf.for") == 1
    loop = ttgir[ttgir.index("scf.for") :]
    assert loop.count("ttg.async_copy_global_to_local") >= 2
    assert product in loop
    assert "isAsync = true" in loop or arch != 90


@needs_triton
@pytest.mark.parametrize("kernel", ["modulator_fwd_kernel", "modulator_bwd_kernel", "dagg_kernel", "dweight_kernel"])
@pytest.mark.parametrize("dtype, begins_at_zero", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_a_step_of_a_float32_product_is_a_sum_of_its_own(kernel, dtype, begins_at_zero):
    """Triton would join a product and the addition after it to a chain; tensor cores go on from the sum so far."""
    from focalnet.kernels import focal_modulation
    from focalnet.kernels.plan import H100, Case

    case = Case.packed(8, 14, 14, 128, (3,), dtype, has_bias=True, mask=(True,) * 6)
    make = focal_modulation.forward_plan if kernel == "modulator_fwd_kernel" else focal_modulation.backward_plan
    plan = make(case, H100)
    launch = next(launch for launch in plan.launches if launch.name == kernel)
    ttir = compiled(launch, plan.dtype_of()).asm["ttir"]
    (accumulator,) = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttir)
    zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ttir)
    assert (accumulator in zeros) == begins_at_zero


# ---- what the backend takes ----------------------------------------------------------------------------------------


def problem(dtype=torch.bfloat16, kernel_sizes=((3, 3), (5, 5)), device="cuda", batch=2):
    return Problem("focal_modulation", torch.device(device), dtype, batch, 14, 14, 96, kernel_sizes)


@needs_triton
@pytest.mark.parametrize(
    "given, reason",
    [
        (problem(), None),
        (problem(torch.float32), None),
        (problem(torch.float16), None),
        (problem(device="cpu"), "the tensors are on cpu, not on a cuda device"),
        (problem(torch.float64), "torch.float64 is not one of torch.float32, torch.bfloat16, torch.float16"),
        (problem(kernel_sizes=((3, 3),) * 5), "5 levels are more than 4"),
        (problem(kernel_sizes=((3, 17),)), "kernel 17 is larger than 15"),
        (problem(batch=2**24), "there are 2^31 positions or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_predicate_says_what_the_backend_takes_and_why_not(given, reason):
    assert triton_backend.why_not(given) == reason


def test_without_triton_the_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_backend.missing.cache_clear()
    try:
        assert focalnet.backends()["triton"] == "triton is not installed: pip install triton"
    finally:
        triton_backend.missing.cache_clear()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert focalnet.backends()["triton"] == "no CUDA device"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run gated_aggregation here: no CUDA device"):
        focalnet.gated_aggregation(
            torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 2), [torch.ones(8, 1, 3, 3)], backend="triton"
        )


# ---- autotuning ----------------------------------------------------------------------------------------------------


@needs_triton
def test_autotuning_times_every_candidate_once_and_remembers_the_fastest(monkeypatch, tmp_path):
    from focalnet.kernels import autotune, launch_table
    from focalnet.kernels.plan import Case

    monkeypatch.setenv("FOCALNET_CACHE_DIR", str(tmp_path / "cache"))
    case = Case.packed(128, 28, 28, 192, (3, 5, 7), torch.bfloat16)
    candidates = launch_table.level_candidates(28, 28, 192, (3, 5, 7), torch.bfloat16)
    assert (
        candidates[0] == launch_table.level_config(28, 28, 192, (3, 5, 7), torch.bfloat16)
        and len(set(candidates)) == len(candidates) > 3
    )
    timed = []

    def seconds(candidate):
        timed.append(candidate)
        return 1.0 if candidate == candidates[2] else 2.0

    assert autotune.choose("focal_modulation", case, "a device", seconds) == candidates[2]
    assert timed == candidates
    assert autotune.choose("focal_modulation", case, "a device", seconds) == candidates[2]
    assert timed == candidates
    autotune.choose("focal_modulation", case, "another device", seconds)
    assert len(timed) == 2 * len(candidates)


@needs_triton
def test_a_candidate_that_does_not_fit_the_device_is_passed_over(monkeypatch, tmp_path):
    import triton
    from focalnet.kernels import autotune, launch_table
    from focalnet.kernels.plan import Case

    monkeypatch.setenv("FOCALNET_CACHE_DIR", str(tmp_path))
    candidates = launch_table.level_candidates(28, 28, 192, (3, 5, 7), torch.bfloat16)

    def seconds(candidate):
        if candidate != candidates[-1]:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    case = Case.packed(128, 28, 28, 192, (3,), torch.bfloat16)
    assert autotune.choose("gated_aggregation", case, "a device", seconds) == candidates[-1]


@needs_triton
def test_nothing_is_tuned_unless_asked_for(monkeypatch):
    from focalnet.kernels import autotune

    monkeypatch.delenv("FOCALNET_AUTOTUNE", raising=False)
    assert not autotune.enabled()
    monkeypatch.setenv("FOCALNET_AUTOTUNE", "1")
    assert autotune.enabled()

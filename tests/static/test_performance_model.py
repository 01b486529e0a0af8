"""The performance model: it counts what a kernel executes, and its committed rows belong to the source that is here.

Its figures are predictions. Nothing in them was measured.
"""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import performance_model
import predicted_calls
import pytest
import torch
import warp
from all_launches import arguments_of
from assembly import code_of
from bytes_moved import case_of, plan_of
from compiled import Pointer, Resources, compile_launch
from executed import Ptx, operations
from executed import arguments_of as ptx_arguments
from instruction_counts import Executed, Kernel
from launch_bytes import Bytes
from loops import loops
from machine_code import Chain, load_cycles, multiply_adds, pipe, wavefronts_alone
from parameters import layout, packed
from performance_model import FILE, disassembled, plan_digest, predict
from processors import H100, PROCESSORS, RTX_4090
from toy_kernels import walk_kernel

from focalnet.benchmark import rows
from focalnet.benchmark.floors import ERF_OPERATIONS, OPERATORS, Work, stages
from focalnet.benchmark.rows import NOWHERE, read
from focalnet.variants import VARIANTS

ROWS = read(FILE, NOWHERE)
WHOLE = [row for row in ROWS if row["subject"] == "all"]


# ---- how often a loop runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walk():
    made = compile_launch(
        walk_kernel,
        {"x": Pointer(torch.float32), "y": Pointer(torch.float32), "n": 1000, "inner": 3, "BLOCK": 128},
        {"num_warps": 4, "num_stages": 1},
        90,
    )
    return Kernel(disassembled(made.asm["cubin"]), 90), layout(made.asm["ptx"])


@pytest.mark.parametrize("n, inner", [(1000, 3), (128, 1), (1, 7)])
def test_the_trips_of_nested_loops_follow_from_the_numbers_of_a_launch(walk, n, inner):
    """Every program walks over every second block of 128, and adds each of them ``inner`` times."""
    kernel, places = walk
    values = [1 << 32, 2 << 32, n, inner, 0, 0][: len(places)]
    parameters = packed(
        places, [value.to_bytes(size, "little") for value, (_, size) in zip(values, places, strict=True)]
    )
    for program in (0, 1):
        blocks = len(range(program, math.ceil(n / 128), 2))
        found = kernel.executed(warp.Launch(parameters, (2, 1, 1), 128), [(program, 0, 0)])[0]
        # The assembler unrolled the inner loop by four: up to three instructions whose guard is off take their slot.
        assert blocks * inner <= found.opcodes.get("FFMA", 0) / 4 <= blocks * (inner + 3)
        elements = (min(128, n - 128 * block) for block in range(program, math.ceil(n / 128), 2))
        assert found.sectors == sum(2 * math.ceil(count / 8) for count in elements)


def test_a_branch_on_what_a_tensor_holds_is_refused():
    text = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	ld.param.b64 %rd1, [kernel_param_0];
	ld.global.b32 %r1, [%rd1];
	setp.eq.s32 %p1, %r1, 0;
	@%p1 bra $L__1;
	mov.b32 %r2, 1;
$L__1:
	ret;
}
"""
    with pytest.raises(ValueError, match=r"ld\.global\.b32"):
        Ptx(text).counts({}, (0, 0, 0), (1, 1, 1), 0, 32)


def test_loops_are_found_and_nested_by_their_headers():
    #   0 -> 1 -> 2 (to itself) -> 3 -> 1, 3 -> 4 -> 5 (to itself) -> 6
    whole = loops([[1], [2], [2, 3], [1, 4], [5], [5, 6], []])
    (outer, last) = whole.inner
    assert (outer.header, outer.blocks, [one.header for one in outer.inner]) == (1, {1, 2, 3}, [2])
    assert (last.header, last.own) == (5, {5})


# Instructions of PTX that are one float32 operation, and two; division takes ten of the machine's.
OPERATIONS = {"add.f32": 1, "sub.f32": 1, "mul.f32": 1, "fma.rn.f32": 2, "div.rn.f32": 10, "div.full.f32": 10}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize("operator, kernel", [("gated_aggregation", "fwd"), ("gated_aggregation_bwd", "bwd")])
def test_machine_code_and_ptx_agree_on_the_arithmetic_of_a_kernel_of_levels(operator, kernel, stage):
    """The PTX's integer arithmetic is run by executed.py, which shares no code with warp.py."""
    case = case_of(operator, stages("tiny_lrf")[stage - 1], 128, torch.bfloat16)
    plan = plan_of(operator, case, H100.device)
    launch = next(one for one in plan.launches if one.name == f"gated_aggregation_{kernel}_kernel")
    made = compile_launch(launch.kernel, arguments_of(launch, plan.dtype_of()), launch.options, 90)
    ptx, places = Ptx(made.asm["ptx"]), layout(made.asm["ptx"])
    parameters = performance_model.parameters_of(launch, places)
    values = [parameters[first : first + size] for first, size in places]
    given = warp.Launch(parameters, launch.grid, 128)
    counted = Kernel(disassembled(made.asm["cubin"]), 90).executed(given, [(0, 0, 0)])[0]
    found = operations(ptx, ptx_arguments(ptx, values), (0, 0, 0), launch.grid, 128)
    wanted = sum(found[name] * weight for name, weight in OPERATIONS.items())
    assert counted.operations == pytest.approx(wanted / 4, rel=0.02)


# ---- what machine code costs ----------------------------------------------------------------------------------------

CODE = """
//--------------------- .text.kernel --------------------------
        /*0000*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0010*/                   SHF.L.U32 R4, R2, 0x10, RZ ;
        /*0020*/                   FFMA R5, R4, R6, R5 ;
        /*0030*/                   FFMA R7, R4, R6, R7 ;
        /*0040*/                   STG.E.128 desc[UR4][R8.64], R4 ;
        /*0050*/                   EXIT ;
"""


def test_instructions_go_to_their_pipes_and_wide_requests_take_several_turns_of_the_l1():
    (block,) = code_of(CODE).blocks
    assert Counter(map(pipe, block.instructions)) == {"memory": 2, "alu": 1, "fma": 2, "control": 1}
    assert [wavefronts_alone(one) for one in block.instructions] == [2, 0, 0, 0, 4, 0]


def test_an_instruction_of_no_known_pipe_is_named():
    (block,) = code_of(CODE.replace("SHF.L.U32", "XYZZY.U32")).blocks
    with pytest.raises(ValueError, match=r"XYZZY\.U32 R4, R2"):
        pipe(block.instructions[1])


@pytest.mark.parametrize("name, count", [("1688.F32", 16 * 8 * 8), ("16816.F32.BF16", 16 * 8 * 16)])
def test_half_a_matrix_product_is_half_the_work(name, count):
    (block,) = code_of(CODE.replace("SHF.L.U32 R4, R2, 0x10, RZ", f"HMMA.{name} R4, R8, R12, R4")).blocks
    assert multiply_adds(block.instructions[1]) == count


@pytest.mark.parametrize("device", sorted(PROCESSORS))
def test_a_warps_own_matrix_products_are_no_faster_than_those_of_a_group(device):
    used = Resources("kernel", 90, registers=64, local=0, shared=0, code=0, threads=128)
    one = Executed({}, tensor=0, wavefronts=0, chain=0, mma=1e6)
    mma, group = (
        predict(PROCESSORS[device], used, [each], 132, Bytes(0, 0)).by["tensor"]
        for each in (one, replace(one, mma=0, tensor=1e6))
    )
    assert mma == pytest.approx(group / PROCESSORS[device].mma) and mma >= group


def test_a_warp_alone_waits_for_its_load_and_no_longer_than_it_takes():
    blocks = code_of(CODE).blocks
    (slow,), (fast,) = (Chain(blocks, load).cycles([0]) for load in (300, 100))
    assert slow - fast == 200
    assert fast >= 100 + len(blocks[0].instructions) - 1
    assert load_cycles(in_l2=0) > load_cycles(in_l2=1)


@pytest.mark.parametrize(
    "processor, registers, shared, threads, programs",
    [(H100, 255, 0, 128, 2), (H100, 128, 0, 256, 2), (H100, 32, 100_000, 128, 2), (RTX_4090, 32, 0, 512, 3)],
)
def test_registers_shared_memory_and_warps_limit_what_is_resident(processor, registers, shared, threads, programs):
    assert processor.programs_per_sm(registers, shared, threads) == programs


def test_a_program_more_than_fits_costs_a_wave_and_idle_processors_cost_nothing_less():
    used = Resources("kernel", 90, registers=255, local=0, shared=0, code=0, threads=128)
    one = Executed({"fma": 4e6}, tensor=0, wavefronts=0, chain=1e6)

    def seconds(programs):
        return predict(H100, used, [one], programs, Bytes(0, 0)).seconds

    assert seconds(1) == seconds(132) == pytest.approx(1e6 / H100.clock)
    assert seconds(264) == seconds(133) == pytest.approx(2 * seconds(132))
    assert seconds(265) > seconds(264)


def test_the_slowest_resource_decides():
    used = Resources("kernel", 90, registers=64, local=0, shared=0, code=0, threads=128)
    one = Executed({"fma": 4000}, tensor=0, wavefronts=0, chain=0)
    assert predict(H100, used, [one], 132, Bytes(0, 0)).bound == "issue"
    assert predict(H100, used, [replace(one, wavefronts=5000)], 132, Bytes(0, 0)).bound == "l1"
    assert predict(H100, used, [one], 132, Bytes(0, 1e9)).bound == "dram"


def test_the_other_resources_are_exposed_by_a_fitted_share():
    used = Resources("kernel", 90, registers=64, local=0, shared=0, code=0, threads=128)
    alone = Executed({"fma": 4000}, tensor=0, wavefronts=0, chain=0)
    processor, l1 = 1000 / H100.clock, 500 / H100.clock
    both = predict(H100, used, [replace(alone, wavefronts=500)], 132, Bytes(0, 0)).seconds
    assert both == pytest.approx(processor + performance_model.EXPOSED * l1)
    latency = predict(H100, used, [replace(alone, chain=5000)], 132, Bytes(0, 0)).seconds
    assert latency == pytest.approx(5000 / H100.clock)


# ---- the committed rows ---------------------------------------------------------------------------------------------


def _plan(row):
    stage = stages(row["variant"])[row["stage"] - 1]
    case = case_of(row["operator"], stage, row["batch"], getattr(torch, row["dtype"]))
    return case, plan_of(row["operator"], case, PROCESSORS[row["x"]].device)


@pytest.mark.parametrize("device", predicted_calls.DEVICES)
def test_every_row_was_predicted_from_the_source_that_is_here(device):
    """Fails when a kernel or a plan changes and the rows do not: then `bench/static/performance_model.py` is due."""
    for row in WHOLE:
        if row["x"] == device:
            where = f"{row['operator']}, {row['variant']}, stage {row['stage']}, batch {row['batch']}"
            assert row["digest"] == plan_digest(_plan(row)[1]), where


@pytest.mark.slow
def test_a_row_follows_from_the_model_again():
    row = next(
        row
        for row in ROWS
        if (row["operator"], row["subject"], row["stage"], row["batch"], row["x"], row["variant"], row["dtype"])
        == ("focal_modulation", "modulator_fwd_kernel", 4, 128, "H100", "tiny_lrf", "bfloat16")
    )
    case, plan = _plan(row)
    total = performance_model.predict_plan(
        SimpleNamespace(**{**vars(plan), "launches": plan.launches[-1:], "dtype_of": plan.dtype_of}), case, H100
    )
    assert round(1e6 * total.seconds, 2) == row["predicted_us"]


def test_every_stage_of_the_published_variants_has_its_rows_in_every_case():
    assert not predicted_calls.lacking(ROWS, OPERATORS)


def test_a_stage_is_predicted_under_the_name_of_the_first_variant_that_has_it():
    assert len(predicted_calls.sizes()) < sum(len(stages(name)) for name in VARIANTS)
    for name in VARIANTS:
        for stage in stages(name):
            found = predicted_calls.named(name, stage.index + 1)
            assert found in predicted_calls.sizes()
            assert replace(found, variant=name, index=stage.index) == stage


@pytest.mark.parametrize("name", predicted_calls.DETAILED)
def test_each_kernel_of_a_detailed_variant_has_a_row(name):
    kernels = {predicted_calls.call_of(row) for row in ROWS if row["variant"] == name and row["subject"] != "all"}
    assert kernels == {predicted_calls.call_of(row) for row in WHOLE if row["variant"] == name}


def test_what_is_left_out_is_said_by_case_and_counted_where_some_of_it_is_there():
    rows = [dict(zip(("variant", "stage", "x", "dtype", "batch", "operator"), call, strict=True)) | {"subject": "all"}
            for call in predicted_calls.calls(OPERATORS)]  # fmt: skip
    assert predicted_calls.lacking(rows, OPERATORS) == {}
    one, *others = [row for row in rows if (row["x"], row["dtype"], row["batch"]) == ("A100", "float16", 8)]
    rows = [row for row in rows if row != one and (row["x"], row["dtype"], row["batch"]) != ("A100", "float16", 1)]
    words = predicted_calls.in_words(predicted_calls.lacking(rows, OPERATORS))
    assert words == f"A100: float16 at batch 8 (1 of {len(others) + 1} calls), 1"


def test_a_run_predicts_what_is_missing_keeps_what_is_current_and_forgets_the_rest(monkeypatch, tmp_path):
    """Rows of older sources are predicted anew, whether or not the run comes to an end."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    fields = ("operator", "variant", "stage", "x", "dtype", "batch", "subject", "digest")
    operators = ("gated_aggregation",)
    table = predicted_calls.Table("table", fields, operators, lambda row: row["digest"] == "new")

    def row(call, digest):
        names = ("variant", "stage", "x", "dtype", "batch", "operator")
        return dict(zip(names, call, strict=True)) | {"subject": "all", "digest": digest}

    first, second, *others = predicted_calls.calls(table.operators)
    rows.write_table([row(first, "new"), row(second, "old")], "table", NOWHERE, table.fields)
    assert table.current() == [row(first, "new")]
    todo = [(stage.variant, stage.index + 1, group.device, group.dtype, group.batch, "gated_aggregation")
            for group, its_stages in table.lacking(table.current()) for stage in its_stages]  # fmt: skip
    assert sorted(todo) == sorted([second, *others])


def rows_but_of_a_b200(group, its_stages):
    if group.device == "B200":
        raise ValueError("`BRA` depends on what memory holds")
    names = ("variant", "stage", "x", "dtype", "batch", "operator", "subject")
    calls = [(one.variant, one.index + 1, group.device, group.dtype, group.batch) for one in its_stages]
    return [dict(zip(names, (*call, "gated_aggregation", "all"), strict=True)) for call in calls]


def test_a_group_that_fails_is_named_and_leaves_the_others_their_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    fields = ("operator", "variant", "stage", "x", "dtype", "batch", "subject")
    table = predicted_calls.Table("table", fields, ("gated_aggregation",), lambda row: True)
    of_a_b200 = [work for work in table.lacking([]) if work[0].device == "B200"]
    with pytest.raises(SystemExit, match=f"^{len(of_a_b200)} groups failed"):
        table.fill(rows_but_of_a_b200, jobs=2)
    every = predicted_calls.calls(table.operators)
    assert [predicted_calls.call_of(row) for row in table.current()] == [call for call in every if call[2] != "B200"]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("left out: B200: ")
    assert printed.err.count("failed: `BRA` depends on what memory holds\n") == len(of_a_b200)
    assert "B200, bfloat16, batch 128, forward, (3, 5) failed" in printed.err


# Launches of a call, at most; microseconds on an H100, predicted, at batch 128 in bfloat16: no slower than the kernels
# were when the model began to take resources in turns.
MAX_LAUNCHES = {"focal_modulation": 4, "focal_modulation_bwd": 12}
MAX_US = {
    ("gated_aggregation", 1): 595, ("gated_aggregation", 2): 320, ("gated_aggregation", 3): 150,
    ("gated_aggregation", 4): 82, ("focal_modulation_bwd", 1): 3085, ("focal_modulation_bwd", 2): 1695,
    ("focal_modulation_bwd", 3): 1005, ("focal_modulation_bwd", 4): 650,
}  # fmt: skip


def test_a_floor_charges_gelu_to_the_unit_that_the_kernels_use():
    gpu = performance_model.gpu_of(H100)
    without = Work(bytes=0, fma=1000, erf=0, matrix=0)
    found = replace(without, erf=100).floors(gpu, torch.bfloat16)
    assert found["fma"] == pytest.approx((1 + 0.1 * ERF_OPERATIONS) * without.floors(gpu, torch.bfloat16)["fma"])
    assert found.keys() == {"memory", "fma", "matrix"}


@pytest.mark.parametrize("operator", MAX_LAUNCHES)
def test_a_call_of_a_tiny_model_at_batch_128_has_few_launches(operator):
    """A large one at 384 pixels has more: its batch is cut, since the scratch of all of it takes gigabytes."""
    found = [row for row in WHOLE if row["operator"] == operator and row["batch"] == 128 and "tiny" in row["variant"]]
    assert found
    assert max(row["launches"] for row in found) <= MAX_LAUNCHES[operator]


@pytest.mark.parametrize("kernel", ["gated_aggregation_fwd_kernel", "gated_aggregation_bwd_kernel"])
def test_levels_at_batch_128_put_two_programs_on_every_processor(kernel):
    """Counts that are no multiple of the blocks of channels leave a block's worth of places empty."""
    found = [row for row in ROWS if (row["subject"], row["batch"], row["variant"]) == (kernel, 128, "tiny_lrf")]
    assert found
    for row in found:
        device = PROCESSORS[row["x"]].device
        blocks = math.ceil(stages(row["variant"])[row["stage"] - 1].channels / 16)
        assert 2 * device.sm_count - blocks < row["programs"] <= 2 * device.sm_count, row


@pytest.mark.parametrize("operator, stage", MAX_US)
def test_the_predicted_time_has_not_grown(operator, stage):
    (row,) = (
        row
        for row in WHOLE
        if (row["operator"], row["stage"], row["batch"], row["x"]) == (operator, stage, 128, "H100")
        and row["variant"] == "tiny_lrf"
        and row["dtype"] == "bfloat16"
    )
    assert row["floor_us"] < row["predicted_us"] <= MAX_US[operator, stage]

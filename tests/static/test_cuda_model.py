"""Predicted times of the CUDA kernels on tensor cores: the counting of PTX that they need, and the committed rows.

Rows are held to the sources and to the bars of bfloat16, batch 128, tiny_lrf on an H100; the bars that are missed are
listed. All figures are predicted.
"""

import functools
import struct

import cuda_model
import included_files
import predicted_calls
import pytest
import torch
from backend_order import committed
from bars import bars
from cuda_model import CUDA, FIELDS, FILE, OPERATORS, Call, digest_of, executed, launches
from executed import Ptx, arguments_of, operations
from processors import PROCESSORS
from ptxas import kernel_name

from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.floors import stages
from focalnet.benchmark.rows import NOWHERE, read

EVERY = read(FILE, NOWHERE)
ROWS = {
    (row["operator"], row["stage"], row["subject"]): row
    for row in EVERY
    if (row["variant"], row["x"], row["batch"], row["dtype"]) == ("tiny_lrf", "H100", 128, "bfloat16")
}
HEAD = """.visible .entry k(
\t.param .align 8 .b8 k_param_0[24],
\t.param .u32 k_param_1
)
{
"""


def entered(body, arguments):
    return Ptx(f"{HEAD}{body}\n}}\n").counts(arguments, (0, 0, 0), (1, 1, 1), 0, 32)


def test_an_indexed_field_of_a_struct_decides_a_branch():
    body = """\tmov.b64 \t%rd1, k_param_0;
\tld.param.u32 \t%r1, [k_param_1];
\tmul.wide.u32 \t%rd2, %r1, 8;
\tadd.s64 \t%rd3, %rd1, %rd2;
\tld.param.v2.u32 \t{%r2, %r3}, [%rd3+8];
\tsetp.eq.s32 \t%p1, %r3, 7;
\t@%p1 bra \t$L__BB0_2;
\tmov.u32 \t%r4, 1;
$L__BB0_2:
\tret;"""
    arguments = {"k_param_1+0.32": 1, "k_param_0+20.32": 7}
    assert entered(body, arguments) == [1, 0, 1, 0]
    assert entered(body, arguments | {"k_param_0+20.32": 6}) == [1, 1, 1, 0]


def test_a_brace_of_inline_assembly_does_not_end_a_kernel():
    body = """\t// begin inline asm
\t{cvt.rn.bf16.f32 %rs1, %f1;
}
\t// end inline asm
\tld.param.u32 \t%r1, [k_param_1];
\tbfi.b32 \t%r2, %r1, 5, 3, 29;
\tsetp.eq.s32 \t%p1, %r2, 21;
\t@%p1 bra \t$L__BB0_2;
\tmov.u32 \t%r4, 1;
$L__BB0_2:
\tret;"""
    assert entered(body, {"k_param_1+0.32": 2}) == [1, 0, 1, 0]
    assert entered(body, {"k_param_1+0.32": 3}) == [1, 1, 1, 0]


def test_kernels_that_differ_in_any_template_argument_have_different_names():
    """The model finds the machine code of a launch by the name."""
    mangled = "_ZN8focalnet4cuda26toeplitz_fwd_planes_kernelI13__nv_bfloat16Li7ELi{}EEEvNS0_12PlanesParamsE"
    names = [kernel_name(mangled.format(channels)) for channels in (8, 16)]
    assert names == [f"toeplitz_fwd_planes_kernel<bfloat16, 7, {channels}>" for channels in (8, 16)]


def test_only_addresses_are_moved_apart():
    """Two numbers side by side may look like an address: 37450 in the upper half does."""
    numbers, address = (7, 37450), 0x55D3_1234_5670
    parameters = struct.pack("<2i2Q", *numbers, address, address + 96)
    moved = struct.unpack("<2i2Q", cuda_model._apart(parameters, range(address, address + 97)))
    assert moved[:2] == numbers
    assert len({address, *moved[2:]}) == 3


def test_rows_are_of_these_sources():
    """Fails when a file changes that the launches of a row depend on: then `bench/static/cuda_model.py` is due."""
    assert ROWS
    old = [row for row in EVERY if row["subject"] == "all" and not cuda_model.is_current(row)]
    assert not old, f"{len(old)} calls, such as {old[0]}"


def test_a_change_of_the_backward_leaves_rows_of_the_forward_as_they_are(monkeypatch):
    def digests():
        cuda_model._digest.cache_clear()
        forward = digest_of(["toeplitz_fwd_planes"], False, torch.bfloat16)
        return forward, digest_of(["toeplitz_bwd"], True, torch.bfloat16)

    before = digests()
    texts = included_files._text
    backward = {CUDA / "toeplitz_bwd.cu", CUDA / "toeplitz_bwd_block.cuh", CUDA / "toeplitz_correlate.cuh"}
    changed = lambda path: texts(path) + b" " * (path in backward)  # noqa: E731
    monkeypatch.setattr(included_files, "_text", changed)
    after = digests()
    monkeypatch.setattr(included_files, "_text", lambda path: texts(path) + b" " * (path.name == "launch.cuh"))
    shared = digests()
    cuda_model._digest.cache_clear()
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert shared[0] != before[0] and shared[1] != before[1]


def test_columns_hold_every_field_of_a_row():
    assert {name for row in EVERY for name in row} <= set(FIELDS)


def test_every_stage_of_the_published_variants_has_its_rows_in_every_case():
    assert not predicted_calls.lacking(EVERY, OPERATORS)


@pytest.mark.parametrize("stage", range(1, 5))
def test_the_documentation_states_the_rows(stage):
    both = [ROWS[operator, stage, "all"] for operator in ("gated_aggregation", "gated_aggregation_bwd")]
    cells = [f"{row[name]:.0f}" for row in both for name in ("predicted_us", "instructions_per_output")]
    assert f"| {' | '.join([str(stage), *cells])} |" in (ROOT / "docs" / "performance.md").read_text()


# ---- what is counted ------------------------------------------------------------------------------------------------

# Instructions of PTX that are one float32 operation, and two; the others take as many of the machine's.
OPERATIONS = {"add.f32": 1, "sub.f32": 1, "mul.f32": 1, "fma.rn.f32": 2, "div.rn.f32": 10, "rcp.rn.f32": 4}
COUNTED = [(stage, backward) for stage in (1, 4) for backward in (False, True)]


@functools.cache
def counted(stage, backward):
    """(call, launch, the machine code's counts, the PTX's) of the first program of the launch with the products."""
    call = Call(stages("tiny_lrf")[stage - 1], 128, torch.bfloat16, PROCESSORS["H100"], backward)
    launch = next(one for one in launches(call) if one.name.startswith("toeplitz"))
    source = cuda_model.source_of(launch.name)
    ptx_text, _, _, symbols = cuda_model.texts_of(source, 90)
    ptx = Ptx(ptx_text, symbols[launch.name])
    arguments = arguments_of(ptx, launch.arguments)
    found = operations(ptx, arguments, (0, 0, 0), (launch.grid, 1, 1), launch.threads)
    return call, launch, executed(launch, 90, programs=1)[0], found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "backward"), COUNTED)
def test_every_product_and_fragment_of_the_ptx_is_counted_once(stage, backward):
    """A warp executes mma and ldmatrix as one: their counts by machine code and by PTX are equal, to the last one."""
    _, _, machine, ptx = counted(stage, backward)
    for opcode, name in (("HMMA", "mma.sync"), ("LDSM", "ldmatrix"), ("BAR", "bar.sync")):
        assert machine.opcodes[opcode] == sum(times for text, times in ptx.items() if text.startswith(name)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "backward"), COUNTED)
def test_float_operations_agree_with_the_ptx(stage, backward):
    _, launch, machine, ptx = counted(stage, backward)
    wanted = sum(ptx[name] * weight for name, weight in OPERATIONS.items()) / (launch.threads // 32)
    assert machine.operations == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 4])
def test_products_hold_the_taps_of_every_output(stage):
    call, launch, machine, _ = counted(stage, False)
    useful = call.outputs * sum(kernel * kernel for kernel in call.stage.kernels)
    assert useful < launch.grid * machine.mma < 8 * useful


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 4])
def test_a_forward_asks_for_no_less_than_its_maps(stage):
    """ctx and agg once, whole sectors; and no more than the gates of all levels for every block of channels beside."""
    call, launch, machine, _ = counted(stage, False)
    least = 2 * 2 * call.outputs / 32
    assert least <= launch.grid * machine.sectors <= 4 * least


# ---- the bars -------------------------------------------------------------------------------------------------------

# Bars that the committed rows miss. A bar that is met, and one that is not met any more, both change this list.
MISSED = {
    "aggregation forward, stage 1, us",
    "aggregation forward, stage 2, us",
    "aggregation forward, stage 3, us",
    "aggregation forward, stage 4, us",
    "focal_modulation backward, stage 1, us",
    "focal_modulation backward, stage 2, us",
    "focal_modulation backward, stage 3, us",
    "focal_modulation backward, stage 4, us",
    "toeplitz_fwd_planes_kernel of cuda, fewest programs",
    "dagg_kernel of triton, fewest programs",
    "dweight_kernel of triton, fewest programs",
    "modulator_bwd_kernel of triton, fewest programs",
    "modulator_fwd_kernel of triton, fewest programs",
    "sum_focal_weights_kernel of triton, fewest programs",
    "sum_partials_kernel of triton, fewest programs",
}
BARS = {bar.name: bar for bar in bars(committed())}


@pytest.mark.parametrize("name", BARS)
def test_a_bar_is_met_unless_it_is_listed(name):
    assert BARS[name].met == (name not in MISSED), BARS[name]


def test_no_bar_is_listed_that_is_not_there():
    assert BARS.keys() >= MISSED

"""Predicted times of the CUDA kernels on tensor cores: the counting of PTX that they need, and the committed rows.

Rows are held to the sources and to the bars of bfloat16, batch 128, tiny_lrf on an H100. Where a bar is missed the
figure that was reached stands here, beside the bar. All figures are predicted.
"""

import pytest
from cuda_model import FILE, digest
from executed import Ptx

from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.rows import NOWHERE, read

ROWS = {
    (row["operator"], row["stage"], row["subject"]): row
    for row in read(FILE, NOWHERE)
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


def test_rows_are_of_these_sources():
    assert ROWS
    assert {row["digest"] for row in ROWS.values() if row["subject"] == "all"} == {digest()}


@pytest.mark.parametrize("stage", range(1, 5))
def test_the_documentation_states_the_rows(stage):
    both = [ROWS[operator, stage, "all"] for operator in ("gated_aggregation", "gated_aggregation_bwd")]
    cells = [f"{row[name]:.0f}" for row in both for name in ("predicted_us", "instructions_per_output")]
    assert f"| {' | '.join([str(stage), *cells])} |" in (ROOT / "docs" / "performance.md").read_text()


# Microseconds of the aggregation by stage: (bar, what was reached). Every bar is missed so far.
FORWARD = {1: (150, 269), 2: (75, 148), 3: (40, 113), 4: (25, 122)}
# Of its gradients; the bars are of focal_modulation, products included.
BACKWARD = {1: (1200, 1638), 2: (600, 933), 3: (350, 591), 4: (250, 745)}
MAX_LAUNCHES = {"gated_aggregation": 4, "gated_aggregation_bwd": 12}


@pytest.mark.parametrize("stage", FORWARD)
@pytest.mark.parametrize(
    ("operator", "figures"), [("gated_aggregation", FORWARD), ("gated_aggregation_bwd", BACKWARD)]
)
def test_predicted_times_do_not_grow(operator, figures, stage):
    assert ROWS[operator, stage, "all"]["predicted_us"] <= figures[stage][1]


@pytest.mark.parametrize("stage", FORWARD)
@pytest.mark.parametrize("operator", MAX_LAUNCHES)
def test_launches_stay_few(operator, stage):
    assert ROWS[operator, stage, "all"]["launches"] <= MAX_LAUNCHES[operator]

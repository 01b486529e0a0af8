"""Bytes the Triton kernels move, against the bounds."""

import math
from dataclasses import replace

import bytes_moved
import pytest
import torch
from bytes_moved import NOWHERE, VARIANTS, case_of, count, kind_of, moved, plan_of, repeats, small_plan
from focalnet.kernels.launch_table import level_config
from focalnet.kernels.plan import H100, MAX_ITEMS

from focalnet.benchmark.floors import OPERATORS, Stage, stages, work
from focalnet.benchmark.rows import read

# Over the least possible, at batch 128 in bfloat16.
BOUNDS = {
    "gated_aggregation": 1.15,
    "focal_modulation": 1.3,
    "focal_modulation_bwd": 1.5,
    "gated_aggregation_bwd": 1.5,
}
LARGE_BOUNDS = {name: 2.0 if name.endswith("_bwd") else 1.8 for name in BOUNDS}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("variant", ["tiny_lrf", "base_lrf"])
@pytest.mark.parametrize("stage", range(4))
def test_bytes_moved_at_224(variant, stage, operator):
    where = stages(variant)[stage]
    found = moved(operator, where, 128, torch.bfloat16)
    least = work(operator, where, 128, torch.bfloat16).bytes
    assert least * 0.99 < found.bytes <= least * BOUNDS[operator]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_committed_rows_hold_the_bounds(variant):
    """Of large at 384 too, which takes minutes to count."""
    bounds = LARGE_BOUNDS if variant.startswith("large") else BOUNDS
    rows = {(row["stage"], row["operator"]): row for row in read("bytes_moved", NOWHERE) if row["variant"] == variant}
    for stage in stages(variant):
        for operator in OPERATORS:
            row = rows[stage.index + 1, operator]
            assert row["shape"] == [128, stage.height, stage.width, stage.channels]
            assert row["ratio"] <= bounds[operator], (stage, operator)
            assert bool(row["scratch_ratio"]) == (row["alive_bytes"] > row["on_chip_bytes"]), (stage, operator)


@pytest.mark.parametrize("batch", [128, 4096])
def test_a_large_batch_does_not_need_more_scratch_than_a_few_walks_over_the_device(batch):
    stage = stages("tiny_lrf")[0]
    plan = plan_of("focal_modulation", case_of("focal_modulation", stage, batch, torch.bfloat16))
    (agg,) = (buffer for name, buffer in plan.buffers.items() if name == "agg")
    assert agg.shape[0] * math.ceil(stage.channels / 16) <= MAX_ITEMS * 2 * H100.sm_count


def test_what_a_program_touches_grows_as_the_scaling_says():
    """Twice the rows, or twice the images: twice of every tensor of positions, as much of every weight."""
    stage = Stage("test", 3, 7, 7, 64, (3, 5))
    case = case_of("gated_aggregation", stage, 128, torch.bfloat16)
    small_case, small = small_plan("gated_aggregation", case, H100)
    (launch,) = small.launches
    once = count(launch, small, small_case)
    taller_case = replace(small_case, height=2 * small_case.height)
    taller = bytes_moved.gated_aggregation.forward_plan(
        taller_case, H100, level_config(7, 7, stage.channels, stage.kernels, torch.bfloat16, 128, H100)
    ).launches[0]
    images_case = replace(small_case, batch=2)
    images = replace(launch, arguments=launch.arguments | {"images": 2})
    for other, other_case in ((taller, taller_case), (images, images_case)):
        plan = bytes_moved.gated_aggregation.forward_plan(other_case, H100)
        twice = bytes_moved._count(other, bytes_moved.tensors_of(plan, other, other_case), 1)
        for argument in ("ctx", "gates", "agg"):
            assert (twice[argument].loaded, twice[argument].stored) == (
                2 * once[argument].loaded,
                2 * once[argument].stored,
            )
        for argument in ("w0", "w1"):
            assert twice[argument].loaded == once[argument].loaded


def test_context_and_gates_are_read_and_agg_is_written_once():
    """At a stage of tiny, by hand: every channel of ctx and agg once, the gates once for each block of channels."""
    stage = stages("tiny_lrf")[3]
    case = case_of("gated_aggregation", stage, 128, torch.bfloat16)
    plan = plan_of("gated_aggregation", case)
    small_case, small = small_plan("gated_aggregation", case, H100)
    counts = {kind_of(launch): count(launch, small, small_case) for launch in small.launches}
    (launch,) = plan.launches
    touched = counts[kind_of(launch)]
    total = {
        name: repeats(launch, name, case) * getattr(touched[name], kind)
        for name, kind in (("ctx", "loaded"), ("gates", "loaded"), ("agg", "stored"))
    }
    positions = 128 * 7 * 7
    blocks = math.ceil(768 / launch.constexprs["BLOCK_C"])
    assert total == {"ctx": positions * 768 * 2, "gates": positions * 4 * 2 * blocks, "agg": positions * 768 * 2}

"""Bytes that a block moves beside its products and its modulation."""

import pytest
import torch
from bytes_moved import NOWHERE
from residual_bytes import counted_bytes, ends, epilogue_rows, least_bytes, plain_bytes, plans

from focalnet.benchmark.rows import read

ROWS = [row for row in read("residual_bytes", NOWHERE) if row["case"] == "residual_bytes"]
VARIANTS = {"tiny_lrf", "base_lrf", "large_fl3", "huge_fl3"}


def name_of(row):
    return "-".join(str(row[name]) for name in ("variant", "stage", "operator", "series"))


def test_every_part_of_the_variants_is_in_the_rows():
    assert {row["variant"] for row in ROWS} == VARIANTS
    parts = {(row["variant"], row["operator"]) for row in ROWS}
    assert {part for variant, part in parts if variant == "tiny_lrf"} == {"sum, then norm", "sum", "norm"}
    assert {part for variant, part in parts if variant == "large_fl3"} == {"norm, then sum"}
    assert {part for variant, part in parts if variant == "huge_fl3"} == {"norm, then sum", "norm"}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_fused_moves_less_than_plain_and_near_the_least(row):
    """At most 1.2 times the least where rows are many; where channels are, parameters and partial sums show."""
    for plain, fused, least in zip(row["plain_bytes"], row["bytes"], row["least_bytes"], strict=True):
        assert fused <= plain
        assert fused <= (1.2 if row["stage"] < 3 else 1.5) * least
    if row["series"] == "training" and row["operator"] != "norm":
        assert sum(row["plain_bytes"]) >= 2.4 * sum(row["bytes"])


def test_the_rows_are_what_the_kernels_move_now():
    """The last stage of tiny, counted again: whole numbers of bytes, so equal."""
    rows = {(r["operator"], r["series"]): r for r in ROWS if (r["variant"], r["stage"]) == ("tiny_lrf", 4)}
    for end in ends("tiny_lrf", 128, torch.bfloat16):
        if end.stage.index == 3 and end.training:
            row = rows[end.part, "training"]
            assert tuple(row["plain_bytes"]) == plain_bytes(end)
            for plan, bytes_, least in zip(plans(end), row["bytes"], row["least_bytes"], strict=True):
                if plan is not None:
                    assert counted_bytes(plan, end) == bytes_
                    assert least_bytes(plan, end) == least


def test_a_norm_in_modulation_pays_as_an_epilogue_in_no_published_variant():
    rows = [row for variant in ("huge_fl3", "huge_fl4") for row in epilogue_rows(variant)]
    assert [row["channels"] for row in rows[:4]] == [352, 704, 1408, 2816]
    assert all(row["weight_passes"] > row["saved_passes_inference"] for row in rows)

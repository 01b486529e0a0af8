"""Plans of focal modulation: the aggregation and the products that follow it, chunk by chunk.

A chunk is as many images as keep what the kernels hand to one another on chip: agg in forward; agg, dm and dagg in
backward. Kernels of a chunk follow one another on the stream, so nothing waits across a grid.
"""

from __future__ import annotations

import math

import torch

from . import gated_aggregation
from .config import level_config, product_config
from .modulator import modulator_fwd_kernel
from .plan import Buffer, Case, Device, Launch, Plan


def forward_plan(case: Case, device: Device, precision: str = "ieee") -> Plan:
    """The launches of ``focal_modulation``: operands q, ctx, gates, w0.., weight, bias; output out."""
    levels = level_config(case.height, case.width, case.channels)
    agg_bytes = case.positions * case.channels * case.dtype.itemsize

    def alive(images: int) -> int:
        return images * agg_bytes + gated_aggregation.forward_launches(case, device, levels, 0, images)[2]

    chunk = largest_chunk(case.batch, alive, device.on_chip_bytes)
    launches: list[Launch] = []
    buffers = {
        "out": Buffer((case.batch, case.height, case.width, case.channels), case.dtype, is_output=True),
        "agg": Buffer((chunk, case.height, case.width, case.channels), case.dtype),
    }
    for first, images in chunks(case.batch, chunk):
        aggregate, scratch, _ = gated_aggregation.forward_launches(case, device, levels, first, images)
        buffers = scratch | buffers if first else buffers | scratch
        launches += [*aggregate, modulator_launch(case, first, images, precision)]
    return Plan(launches, buffers, operands(case), alive(chunk))


def modulator_launch(case: Case, first_image: int, images: int, precision: str) -> Launch:
    config = product_config(case.channels, case.dtype)
    rows = images * case.positions
    grid = math.ceil(rows / config.block_m) * math.ceil(case.channels / config.block_n)
    return Launch(
        modulator_fwd_kernel,
        (grid, 1, 1),
        {
            "agg": "agg",
            "weight": "weight",
            "bias": "bias" if case.has_bias else "weight",
            "q": "q",
            "out": "out",
            "first_row": first_image * case.positions,
            "row_count": rows,
            **q_pitch(case),
        },
        {**product_constexprs(case, precision), "HAS_BIAS": case.has_bias, **q_alignment(case)},
        config.num_warps,
        config.num_stages,
    )


def operands(case: Case) -> dict[str, torch.dtype]:
    names = ("q", "weight", *(("bias",) if case.has_bias else ()))
    return gated_aggregation.operands(case) | dict.fromkeys(names, case.dtype)


def q_pitch(case: Case) -> dict[str, int]:
    return {"q_pitch": case.q_pitch // gated_aggregation.alignment(case.q_pitch, case.dtype)}


def q_alignment(case: Case) -> dict[str, int]:
    return {"Q_ALIGN": gated_aggregation.alignment(case.q_pitch, case.dtype)}


def product_constexprs(case: Case, precision: str) -> dict[str, object]:
    config = product_config(case.channels, case.dtype)
    return {
        "C": case.channels,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def largest_chunk(batch: int, alive: object, budget: int) -> int:
    """The largest even share of the batch whose scratch stays within the budget; one image where none does."""
    for parts in range(1, batch + 1):
        images = math.ceil(batch / parts)
        if alive(images) <= budget:
            return images
    return 1


def chunks(batch: int, chunk: int) -> list[tuple[int, int]]:
    return [(first, min(chunk, batch - first)) for first in range(0, batch, max(chunk, 1))]

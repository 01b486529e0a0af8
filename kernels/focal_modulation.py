"""Plans of focal modulation: the aggregation and the products that follow it, chunk by chunk.

A chunk is as many images as keep what the kernels hand to one another on chip: agg in forward; agg, dm and dagg in
backward. Kernels of a chunk follow one another on the stream, so nothing waits across a grid.
"""

from __future__ import annotations

import math

import torch

from . import gated_aggregation
from .config import BACKWARD, FORWARD, LevelConfig, ProductConfig, level_config, product_config, weight_product_config
from .gated_aggregation_bwd import Backward
from .modulator import dagg_kernel, dweight_kernel, modulator_bwd_kernel, modulator_fwd_kernel
from .plan import Buffer, Case, Device, Launch, Plan, chunks, largest_chunk, with_scratch
from .sums import sum_partials_launch


def forward_plan(case: Case, device: Device, config: LevelConfig | None = None, precision: str = "ieee") -> Plan:
    """The launches of ``focal_modulation``: operands q, ctx, gates, w0.., weight, bias; output out."""
    levels = config or level_config(case.height, case.width, case.channels, case.kernel_heights, case.dtype)
    agg_bytes = case.positions * case.channels * case.dtype.itemsize

    def alive(images: int) -> int:
        return images * agg_bytes + gated_aggregation.forward_launches(case, device, levels, 0, images)[2]

    chunk = largest_chunk(case, device, levels, alive)
    launches: list[Launch] = []
    buffers = {
        "out": Buffer((case.batch, case.height, case.width, case.channels), case.dtype, is_output=True),
        "agg": Buffer((chunk, case.height, case.width, case.channels), case.dtype),
    }
    for first, images in chunks(case.batch, chunk):
        aggregate, scratch, _ = gated_aggregation.forward_launches(case, device, levels, first, images, chunk=chunk)
        buffers = with_scratch(buffers, scratch)
        launches += [*aggregate, modulator_launch(case, device, first, images, precision)]
    return Plan(launches, buffers, operands(case), alive(chunk))


def modulator_launch(case: Case, device: Device, first_image: int, images: int, precision: str) -> Launch:
    config = product_config(FORWARD, case.channels, case.dtype)
    rows = images * case.positions
    return Launch(
        modulator_fwd_kernel,
        (slabs_of(case, config) * groups_of(case, device, config, rows), 1, 1),
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
        {**product_constexprs(case, config, precision), "HAS_BIAS": case.has_bias, **q_alignment(case)},
        config.num_warps,
        config.num_stages,
    )


def backward_plan(case: Case, device: Device, config: LevelConfig | None = None, precision: str = "ieee") -> Plan:
    """The launches of the backward: operands dout and those of forward; mask (q, ctx, gates, weight, bias, focal).

    Outputs are dq, dctx, dgates, dweight, dbias and dw0.., as the mask asks for.
    """
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = case.mask
    aggregation_mask = (need_ctx, need_gates, need_focal)
    need_agg, need_dagg = need_q or need_weight, any(aggregation_mask)
    need_m = need_weight or need_dagg
    levels = config or level_config(case.height, case.width, case.channels, case.kernel_heights, case.dtype)
    image = (case.height, case.width, case.channels)
    image_bytes = case.positions * case.channels * case.dtype.itemsize

    product = product_config(BACKWARD, case.channels, case.dtype)

    def alive(images: int) -> int:
        # Partial sums, of dW and of db, live from the first chunk to the last.
        splits = need_weight * splits_of(case, device, images)
        groups = need_bias * groups_of(case, device, product, images * case.positions)
        sums = 4 * case.channels * (splits * case.channels + groups)
        forward = gated_aggregation.forward_launches(case, device, levels, 0, images, need_agg)[2]
        down = Backward(case, device, levels, aggregation_mask, images).alive(images)
        # agg, beside its rings; agg and dm; dm and dagg, which takes agg's place; dagg, beside the rings downwards
        chunk_bytes = max(images * image_bytes + max(forward, need_dagg * down), 2 * images * image_bytes)
        return chunk_bytes + sums

    chunk = largest_chunk(case, device, levels, alive)
    backward = Backward(case, device, levels, aggregation_mask, chunk)
    splits = splits_of(case, device, chunk)
    groups = groups_of(case, device, product, chunk * case.positions)
    launches: list[Launch] = []
    buffers: dict[str, Buffer] = {"agg": Buffer((chunk, *image), case.dtype)}
    if need_m:
        buffers["dm"] = Buffer((chunk, *image), case.dtype)
    if need_q:
        buffers["dq"] = Buffer((case.batch, *image), case.dtype, is_output=True)
    if need_weight:
        buffers["dweight_parts"] = Buffer((splits, case.channels, case.channels), torch.float32, zeroed=True)
        buffers["dweight"] = Buffer((case.channels, case.channels), case.dtype, is_output=True)
    for first, images in chunks(case.batch, chunk):
        if need_agg or need_dagg:
            aggregate, scratch, _ = gated_aggregation.forward_launches(
                case, device, levels, first, images, need_agg, chunk=chunk
            )
            buffers = with_scratch(buffers, scratch)
            launches += aggregate
        launches.append(modulator_bwd_launch(case, groups, first, images, need_m, precision))
        if need_weight:
            launches.append(dweight_launch(case, images, splits, precision))
        if need_dagg:
            launches += [dagg_launch(case, groups, images, precision), *backward.launches(first, images, "agg")]
    if need_dagg:
        buffers |= backward.buffers()
        launches += backward.last_launches()
    if need_weight:
        launches.append(sum_partials_launch("dweight_parts", "dweight", splits, case.channels**2))
    if need_bias:
        buffers["dbias_parts"] = Buffer((groups, case.channels), torch.float32)
        buffers["dbias"] = Buffer((case.channels,), case.dtype, is_output=True)
        launches.append(sum_partials_launch("dbias_parts", "dbias", groups, case.channels))
    return Plan(launches, buffers, operands(case) | {"dout": case.dtype}, alive(chunk))


def modulator_bwd_launch(
    case: Case, groups: int, first_image: int, images: int, need_m: bool, precision: str
) -> Launch:
    config = product_config(BACKWARD, case.channels, case.dtype)
    need_q, need_bias = case.mask[0], case.mask[4]
    return Launch(
        modulator_bwd_kernel,
        (slabs_of(case, config) * groups, 1, 1),
        {
            "agg": "agg",
            "weight": "weight",
            "bias": "bias" if case.has_bias else "weight",
            "q": "q",
            "dout": "dout",
            "dq": "dq" if need_q else "agg",
            "dm": "dm" if need_m else "agg",
            "dbias": "dbias_parts" if need_bias else "agg",
            "first_row": first_image * case.positions,
            "row_count": images * case.positions,
            **q_pitch(case),
        },
        {
            **product_constexprs(case, config, precision),
            "HAS_BIAS": case.has_bias,
            "NEED_Q": need_q,
            "NEED_M": need_m,
            "NEED_BIAS": need_bias,
            **q_alignment(case),
        },
        config.num_warps,
        config.num_stages,
    )


def dagg_launch(case: Case, groups: int, images: int, precision: str) -> Launch:
    """dm @ W; agg is not needed any more, dagg takes its place."""
    config = product_config(BACKWARD, case.channels, case.dtype)
    return Launch(
        dagg_kernel,
        (slabs_of(case, config) * groups, 1, 1),
        {"dm": "dm", "weight": "weight", "dagg": "agg", "row_count": images * case.positions},
        product_constexprs(case, config, precision),
        config.num_warps,
        config.num_stages,
    )


def dweight_launch(case: Case, images: int, splits: int, precision: str) -> Launch:
    config = weight_product_config(case.channels, case.dtype)
    rows = images * case.positions
    tiles = math.ceil(case.channels / config.block_m) * math.ceil(case.channels / config.block_n)
    return Launch(
        dweight_kernel,
        (tiles, splits, 1),
        {
            "dm": "dm",
            "agg": "agg",
            "partial": "dweight_parts",
            "row_count": rows,
            "rows_per_split": math.ceil(rows / splits),
        },
        product_constexprs(case, config, precision),
        config.num_warps,
        config.num_stages,
    )


def slabs_of(case: Case, config: ProductConfig) -> int:
    return math.ceil(case.channels / config.block_n)


def groups_of(case: Case, device: Device, config: ProductConfig, rows: int) -> int:
    """Programs for each slab of a product; together they read W once a group.

    As many as fill the device while W's bytes stay below their share; and no more than make the longest walk shorter.
    """
    slabs, tiles = slabs_of(case, config), math.ceil(rows / config.block_m)
    worth = max(config.weight_share * rows / case.channels, config.least_busy * device.sm_count / slabs)
    groups = max(1, math.ceil(min(worth, config.programs_per_sm * device.sm_count // slabs)))
    walk = math.ceil(tiles / groups)
    return math.ceil(tiles / walk)


def splits_of(case: Case, device: Device, images: int) -> int:
    """Ranges of rows of dW's sum: as many as fill the device, each of some length.

    Their partial sums take a tenth of what stays on chip, or more where two thirds of the device would idle.
    """
    config = weight_product_config(case.channels, case.dtype)
    tiles = math.ceil(case.channels / config.block_m) * math.ceil(case.channels / config.block_n)
    fitting = device.on_chip_bytes // 10 // (4 * case.channels**2)
    filling = min(device.sm_count // tiles, max(fitting, math.ceil(device.sm_count / 3 / tiles)))
    return max(1, min(filling, images * case.positions // (8 * config.block_k)))


def operands(case: Case) -> dict[str, torch.dtype]:
    names = ("q", "weight", *(("bias",) if case.has_bias else ()))
    return gated_aggregation.operands(case) | dict.fromkeys(names, case.dtype)


def q_pitch(case: Case) -> dict[str, int]:
    return {"q_pitch": case.q_pitch // gated_aggregation.alignment(case.q_pitch, case.dtype)}


def q_alignment(case: Case) -> dict[str, int]:
    return {"Q_ALIGN": gated_aggregation.alignment(case.q_pitch, case.dtype)}


def product_constexprs(case: Case, config: ProductConfig, precision: str) -> dict[str, object]:
    return {
        "C": case.channels,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }

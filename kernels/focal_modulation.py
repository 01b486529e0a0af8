"""Plans of focal modulation: the aggregation and the products that follow it, chunk by chunk.

A chunk is the whole batch, unless its scratch would grow too large: a launch has to fill the device first. Kernels of
a chunk follow one another on the stream, so nothing waits across a grid.
"""

from __future__ import annotations

import torch

from . import gated_aggregation, level_launch
from .gated_aggregation_bwd import Backward
from .launch_table import BACKWARD, LevelConfig, product_config
from .level_launch import level_config_of
from .modulator import dagg_launch, dweight_launch, groups_of, modulator_bwd_launch, modulator_launch, splits_of
from .plan import Buffer, Case, Device, Launch, Plan, chunks, largest_chunk, with_scratch
from .sums import sum_partials_launch


def forward_plan(case: Case, device: Device, config: LevelConfig | None = None, precision: str = "ieee") -> Plan:
    """The launches of ``focal_modulation``: operands q, ctx, gates, w0.., weight, bias; output out."""
    levels = config or level_config_of(case, device)
    agg_bytes = case.positions * case.channels * case.dtype.itemsize

    def alive(images: int) -> int:
        return images * agg_bytes + gated_aggregation.forward_launches(case, device, levels, 0, images)[2]

    chunk = largest_chunk(case, device, levels)
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


def backward_plan(case: Case, device: Device, config: LevelConfig | None = None, precision: str = "ieee") -> Plan:
    """The launches of the backward: operands dout and those of forward; mask (q, ctx, gates, weight, bias, focal).

    Outputs are dq, dctx, dgates, dweight, dbias and dw0.., as the mask asks for. With a ``gradient_pitch`` the first
    three are operands, which the kernels write.
    """
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = case.mask
    aggregation_mask = (need_ctx, need_gates, need_focal)
    need_agg, need_dagg = need_q or need_weight, any(aggregation_mask)
    need_m = need_weight or need_dagg
    levels = config or level_config_of(case, device)
    image = (case.height, case.width, case.channels)
    image_bytes = case.positions * case.channels * case.dtype.itemsize

    product = product_config(BACKWARD, case.channels, case.dtype, device)

    def alive(images: int) -> int:
        # Partial sums, of dW and of db, live from the first chunk to the last.
        splits = need_weight * splits_of(case, device, images, levels.splits)
        groups = need_bias * groups_of(case, device, product, images * case.positions)
        sums = 4 * case.channels * (splits * case.channels + groups)
        forward = gated_aggregation.forward_launches(case, device, levels, 0, images, need_agg)[2]
        down = Backward(case, device, levels, aggregation_mask, images).alive(images)
        # agg, beside its rings; agg and dm; dm and dagg, which takes agg's place; dagg, beside the rings downwards
        chunk_bytes = max(images * image_bytes + max(forward, need_dagg * down), 2 * images * image_bytes)
        return chunk_bytes + sums

    chunk = largest_chunk(case, device, levels)
    backward = Backward(case, device, levels, aggregation_mask, chunk)
    splits = splits_of(case, device, chunk, levels.splits)
    groups = groups_of(case, device, product, chunk * case.positions)
    launches: list[Launch] = []
    buffers: dict[str, Buffer] = {"agg": Buffer((chunk, *image), case.dtype)}
    if need_m:
        buffers["dm"] = Buffer((chunk, *image), case.dtype)
    if need_q and not case.gradient_pitch:
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
        launches.append(modulator_bwd_launch(case, device, groups, first, images, need_m, precision))
        if need_weight:
            launches.append(dweight_launch(case, images, splits, precision))
        if need_dagg:
            launches.append(dagg_launch(case, device, groups, images, precision))
            launches += backward.launches(first, images, "agg")
    if need_dagg:
        buffers |= backward.buffers()
        launches += backward.last_launches()
    if need_weight:
        launches.append(sum_partials_launch("dweight_parts", "dweight", splits, case.channels**2))
    if need_bias:
        buffers["dbias_parts"] = Buffer((groups, case.channels), torch.float32)
        buffers["dbias"] = Buffer((case.channels,), case.dtype, is_output=True)
        launches.append(sum_partials_launch("dbias_parts", "dbias", groups, case.channels))
    written = dict.fromkeys(("dq", "dctx", "dgates") if case.gradient_pitch else (), case.dtype)
    return Plan(launches, buffers, operands(case) | {"dout": case.dtype} | written, alive(chunk))


def operands(case: Case) -> dict[str, torch.dtype]:
    names = ("q", "weight", *(("bias",) if case.has_bias else ()))
    return level_launch.operands(case) | dict.fromkeys(names, case.dtype)

"""Rows of C channels: what the kernels around a block's residual branches share.

    program p            owns the tiles p, p + programs, ... of ROWS whole rows [ROWS, BLOCK_C], BLOCK_C >= C
    reads once           its rows, and the parameters [C]
    keeps in registers   sums over its rows, and a row's mean and deviation
    writes once          its rows, and each sum as a row of partials [programs, SUMS, C]

Statistics are taken in float32, in two passes over registers: the mean, then the squares of what is left. They cost no
bytes, so none are saved: backward takes them again from the saved row. Parameters of a kernel: tensors read, tensors
written, numbers, then constants (what is given, what is asked for, C, the tile).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch_table import row_config
from .plan import Buffer, Device, Launch, Plan
from .sums import sum_partials_launch

# ---- on the device --------------------------------------------------------------------------------------------------


@triton.jit
def load_vector(vector, columns, C: tl.constexpr):
    """[C] in any dtype -> [1, BLOCK_C] in float32, zero beyond C."""
    return tl.load(vector + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rows_of_tile(tile, columns, row_count, C: tl.constexpr, ROWS: tl.constexpr):
    """Numbers of the tile's rows (ROWS,), and which elements (ROWS, BLOCK_C) of it exist."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    return rows, (rows < row_count)[:, None] & (columns < C)[None, :]


@triton.jit
def load_rows(tensor, rows, columns, inside, C: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(tensor, rows, columns, inside, values, C: tl.constexpr):
    """``values`` have the dtype of ``tensor`` already: the interpreter would cut bfloat16 off (see tiles.rounded)."""
    tl.store(tensor + rows.to(tl.int64)[:, None] * C + columns[None, :], values, mask=inside)


@triton.jit
def layer_scale(gamma, columns, C: tl.constexpr, HAS_GAMMA: tl.constexpr):
    """gamma [1, BLOCK_C] in float32, or ones."""
    scale = tl.full((1, columns.shape[0]), 1.0, tl.float32)
    if HAS_GAMMA:
        scale = load_vector(gamma, columns, C)
    return scale


@triton.jit
def branch_scale(gamma, kept, rows, row_count, positions, keep, HAS_KEPT: tl.constexpr):
    """gamma [1, BLOCK_C] * kept of the row's sample / keep: layer scale and stochastic depth."""
    if HAS_KEPT:
        sample = tl.load(kept + rows // positions, mask=rows < row_count, other=0.0).to(tl.float32)
        gamma = gamma * (sample / keep)[:, None]
    return gamma


@triton.jit
def normalised(x, inside, eps, C: tl.constexpr):
    """(x - mean) / deviation, and 1 / deviation, of every row. ``x`` is zero beyond C. ``eps`` must not be zero: rows
    beyond the last one are zeros, and the root of eps is their deviation."""
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalised_bwd(dxhat, xhat, rstd, C: tl.constexpr):
    """The gradient of x from that of ``normalised(x)``; both factors are zero beyond C."""
    along_mean = tl.sum(dxhat, axis=1) / C
    along_xhat = tl.sum(dxhat * xhat, axis=1) / C
    return (dxhat - along_mean[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]


@triton.jit
def store_sum(partials, which, values, columns, SUMS: tl.constexpr, C: tl.constexpr):
    """The program's row ``which`` of partials [programs, SUMS, C]."""
    at = (tl.program_id(0) * SUMS + which).to(tl.int64) * C
    tl.store(partials + at + columns, tl.sum(values, axis=0), mask=columns < C)


# ---- on the host ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsCase:
    """One kind of call. ``operands`` and ``outputs``: dtypes of the tensors that are given and wanted, by name.

    rows: B * H * W, of ``positions`` = H * W a sample. ``sums``: gradients of vectors (C,), one row each of the output
    "sums" (dtype of the parameters), or none.
    """

    rows: int
    positions: int
    channels: int
    operands: Mapping[str, torch.dtype]
    outputs: Mapping[str, torch.dtype]
    sums: int = 0
    keep: float = 1.0
    eps: float = 0.0

    def numbers(self, *names: str) -> dict[str, int | float]:
        values = {"row_count": self.rows, "positions": self.positions, "keep": self.keep, "eps": self.eps}
        return {name: values[name] for name in names}


def plan_rows(
    kernel: Callable, case: RowsCase, device: Device, numbers: Mapping, flags: Mapping, backward: bool = False
) -> Plan:
    """The launch of ``kernel`` on all rows, and that which adds up its programs' sums.

    A tensor that is neither given nor wanted is replaced by the first one: the kernel does not touch it.
    """
    config = row_config(case.channels, backward)
    programs = min(math.ceil(case.rows / config.rows), config.programs_per_sm * device.sm_count)
    buffers = {
        name: Buffer((case.rows, case.channels), dtype, is_output=True)
        for name, dtype in case.outputs.items()
        if name != "sums"
    }
    if case.sums:
        buffers["sums"] = Buffer((case.sums, case.channels), case.outputs["sums"], is_output=True)
        buffers["partials"] = Buffer((programs, case.sums, case.channels), torch.float32)
    constants = {**flags, "C": case.channels, "ROWS": config.rows, "BLOCK_C": config.block_c}
    known, first = {*case.operands, *buffers}, next(iter(case.operands))
    tensors = {
        name: name if name in known else first for name in kernel.arg_names if name not in {*numbers, *constants}
    }
    launches = [
        Launch(kernel, (programs, 1, 1), tensors | numbers, constants, config.num_warps, maxnreg=config.registers)
    ]
    if case.sums:
        launches.append(sum_partials_launch("partials", "sums", programs, case.sums * case.channels))
    return Plan(launches, buffers, dict(case.operands), alive_bytes=_bytes_of(buffers.get("partials")))


def _bytes_of(buffer: Buffer | None) -> int:
    return 0 if buffer is None else buffer.nbytes

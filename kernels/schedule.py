"""When each level works on which rows: lags and ring sizes of a program that streams over a plane.

A program owns BLOCK_C channels of an image and walks down its rows, a few at a time. In one step every level works on
the same number of rows. They lag behind those of the level before by half a kernel, so that all rows it reads exist.
A level writes into a ring of rows in global memory (in practice L1 and L2), which has as many rows as its last reader
lags behind. There is a barrier between two levels, so a row is overwritten only after the barrier that follows its
last use.

Plain Python on plain numbers: tests run the schedule itself, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Lags in rows behind the first level, ring sizes in rows. A whole plane has no rings and nothing lags.

    ``lag[l]``: where ctx_{l+1} is written; ``dz_lag[l]``: where dz_l is written, and dW_l summed. dctx_l lags half a
    kernel behind dz_l. ``ring[l]`` keeps ctx_{l+1}; ``dz_ring[l]`` GELU'(z_l), and in the same place dz_l.
    """

    rows: int
    whole_plane: bool
    lag: tuple[int, ...]
    ring: tuple[int, ...]
    dz_lag: tuple[int, ...] = ()
    dz_ring: tuple[int, ...] = ()
    halves: tuple[int, ...] = ()

    @property
    def down_lag(self) -> tuple[int, ...]:
        """Where dctx_l is made of dz_l, and dz_{l-1} of that."""
        return tuple(lag + half for lag, half in zip(self.dz_lag, self.halves, strict=True))

    def rows_kept(self, height: int) -> int:
        """Rows of scratch, all rings together."""
        rings = (*self.ring[:-1], *self.dz_ring)
        return height * len(rings) if self.whole_plane else sum(rings)


def forward(kernel_heights: tuple[int, ...], rows: int, whole_plane: bool) -> Schedule:
    """Levels in one pass; the last one also reads the rows of all levels to sum them under their gates."""
    levels = len(kernel_heights)
    if whole_plane:
        return Schedule(rows, True, (0,) * levels, (0,) * levels)
    lag = _forward_lags(kernel_heights)
    ring = [
        rows + max(lag[level + 1] + kernel_heights[level + 1] // 2, lag[-1]) - lag[level]
        for level in range(levels - 1)
    ]
    return Schedule(rows, False, lag, (*ring, 0))


def backward(kernel_heights: tuple[int, ...], rows: int, whole_plane: bool) -> Schedule:
    """Levels forward, dz of the last, then down again: the step of level l turns dz_l into dW_l and dz_{l-1}."""
    levels = len(kernel_heights)
    if whole_plane:
        zeros = (0,) * levels
        return Schedule(rows, True, zeros, zeros, zeros, zeros, zeros)
    halves = [height // 2 for height in kernel_heights]
    lag = _forward_lags(kernel_heights)
    # The last dz is written by the forward level itself, dz_{l-1} half a kernel behind the dz_l that it reads.
    dz_lag = [0] * levels
    dz_lag[-1] = lag[-1]
    for level in reversed(range(1, levels)):
        dz_lag[level - 1] = dz_lag[level] + halves[level]
    ring = [rows + dz_lag[level + 1] + halves[level + 1] - lag[level] for level in range(levels - 1)]
    dz_ring = [rows + dz_lag[level] + 2 * halves[level] - lag[level] for level in range(levels)]
    return Schedule(rows, False, lag, (*ring, 0), tuple(dz_lag), tuple(dz_ring), tuple(halves))


def _forward_lags(kernel_heights: tuple[int, ...]) -> tuple[int, ...]:
    lags = [0]
    for height in kernel_heights[1:]:
        lags.append(lags[-1] + height // 2)
    return tuple(lags)

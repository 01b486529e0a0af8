"""Arithmetic on arrays of a value for each thread: what the expressions of semantics.py name."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64


def _up(x: Array) -> Array:
    return x.astype(U64)


def _sext(x: Array) -> Array:
    return x.view(I32).astype(I64).view(U64)


def _low(x: Array) -> Array:
    return x.astype(U32)


def _high(x: Array) -> Array:
    return (x >> _THIRTY_TWO).astype(U32)


def _join(low: Array, high: Array) -> Array:
    return low.astype(U64) | high.astype(U64) << _THIRTY_TWO


_THIRTY_TWO = U64(32)


def _float_up(number: Array) -> Array:
    exact = number.astype(np.longdouble if number.itemsize == 8 else np.float64)
    found = exact.astype(np.float32)
    return np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found).view(U32)


def _truncated(number: Array, width: int) -> Array:
    exact = np.nan_to_num(number.view(np.float32).astype(np.float64), nan=0.0, posinf=2.0**width)
    inside = np.where(exact < 2.0**width, np.maximum(np.trunc(exact), 0), 0)
    return np.where(exact < 2.0**width, inside.astype(U64), U64(2**width - 1)).astype(U32 if width == 32 else U64)


def _product_down(a: Array, b: Array) -> Array:
    """Rounded towards zero."""
    with np.errstate(invalid="ignore"):
        exact = a.astype(np.float64) * b.astype(np.float64)
    found = exact.astype(np.float32)
    return np.where(abs(found) > abs(exact), np.nextafter(found, np.float32(0)), found).view(U32)


def _reciprocal(number: Array) -> Array:
    with np.errstate(divide="ignore", over="ignore"):
        return (1.0 / number.view(np.float32).astype(np.float64)).astype(np.float32).view(U32)


def _popcount(x: Array) -> Array:
    return np.unpackbits(x.view(np.uint8).reshape(-1, 4), axis=1).sum(1).astype(U32)


def _first(x: Array, active: Array | None) -> Array:
    """Of every warp, what its first active thread holds."""
    lanes = x.reshape(-1, 32)
    chosen = 0 if active is None else active.reshape(-1, 32).argmax(1)
    return np.repeat(lanes[np.arange(len(lanes)), chosen], 32)


def _elect(active: Array) -> Array:
    lanes = active.reshape(-1, 32)
    return (lanes & (lanes.cumsum(1) == 1)).reshape(-1)


def _ballot(x: Array, active: Array | None) -> Array:
    lanes = (x if active is None else x & active).reshape(-1, 32)
    return np.repeat(np.packbits(lanes, axis=1, bitorder="little").view(U32)[:, 0], 32)


def _shuffled(x: Array, by: Array, mode: str) -> Array:
    lane = np.arange(len(x)) % 32
    other = by.astype(np.int64)
    to = {"IDX": other, "BFLY": lane ^ other, "DOWN": lane + other, "UP": lane - other}[mode]
    to = np.where((to < 0) | (to > 31), lane, to)
    return x[np.arange(len(x)) - lane + to]


NAMES = {
    "up": _up, "sext": _sext, "low": _low, "high": _high, "join": _join, "float_up": _float_up,
    "truncated": _truncated, "reciprocal": _reciprocal, "popcount": _popcount, "first": _first, "ballot": _ballot,
    "elected": _elect, "product_down": _product_down,
    "shuffled": _shuffled, "where": np.where, "least": np.minimum, "most": np.maximum, "abs": np.abs,
    "cast": lambda x: x.astype(U32), "one": U64(1), "n64": U64, "int32": I32, "int64": I64, "uint32": U32,
    "float32": np.float32,
    "uint64": U64,
}  # fmt: skip

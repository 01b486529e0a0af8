"""Compares the times of several calls in one process. The calls take turns.

On a GPU, CUDA events before and after a block of calls measure it. On a CPU, torch.utils.benchmark does. Each call
gets a running number to select its inputs. With `copies_past_cache` copies of the inputs, no call finds them in a
cache.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.benchmark import Timer

WARM_UP = 3
# The time of a block of calls: far above the microseconds that clocks and events resolve.
BLOCK_S = 0.02
MAX_COPIES = 16


@dataclass
class Timing:
    """Seconds per call, one value for each round."""

    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """The statistics for a result row."""
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        fastest = min(self.seconds)
        return {"median_s": median, "quartiles_s": [low, high], "fastest_s": fastest, "runs": len(self.seconds)}


def measure(
    calls: dict[str, Callable[[int], object]],
    device: torch.device | str = "cpu",
    rounds: int = 7,
    on_block: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time a block of each of ``calls`` in each round. ``on_block`` is called after each block, for a progress bar."""
    block = _cuda_block if torch.device(device).type == "cuda" else _cpu_block
    repeats = {name: _warm_up(call, block) for name, call in calls.items()}
    timings = {name: Timing() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timings[name].seconds.append(block(call, repeats[name]))
            on_block()
    return timings


def ratio(theirs: list[float], ours: list[float]) -> dict[str, object]:
    """The median of ``theirs / ours`` over rounds, its quartiles, and its relative standard error.

    The error is that of a median under a normal distribution, 1.2533 s / sqrt(n). s is estimated from the quartiles,
    which are 1.349 s apart, so that a few disturbed rounds have little influence.
    """
    low, median, high = statistics.quantiles(
        [t / o for t, o in zip(theirs, ours, strict=True)], n=4, method="inclusive"
    )
    error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(theirs)) / median
    return {"ratio": median, "ratio_quartiles": [low, high], "ratio_error": error}


def copies_past_cache(bytes_per_call: int, device: torch.device | str = "cpu") -> int:
    """The number of copies of the inputs needed so that each is evicted from the cache before it is used again."""
    if torch.device(device).type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 32 << 20
    return max(2, min(MAX_COPIES, 2 * cache // max(1, bytes_per_call) + 1))


def _warm_up(call: Callable[[int], object], block: Callable[[Callable[..., Any], int], float]) -> int:
    """Run a few calls. Returns the number of calls in a block."""
    for index in range(WARM_UP):
        call(index)
    return max(1, round(BLOCK_S / max(block(call, 1), 1e-7)))


def _cpu_block(call: Callable[[int], object], repeats: int) -> float:
    scope = {"call": call, "number": itertools.count()}
    return Timer("call(next(number))", globals=scope, num_threads=torch.get_num_threads()).timeit(repeats).mean


def _cuda_block(call: Callable[[int], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in range(repeats):
        call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats

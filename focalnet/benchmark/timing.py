"""The timing core: several calls compared in one process, all taking turns.

On a GPU a block of calls lies between two CUDA events; on a CPU torch.utils.benchmark times it. Each call gets a
running number, by which it picks its inputs: with `copies_past_cache` of them no call finds its inputs in a cache.
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
BLOCK_S = 0.02  # a block of calls lasts at least this long: clocks and events resolve microseconds
MAX_COPIES = 16


@dataclass
class Timing:
    """Seconds a call took, one value for each round."""

    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """As result rows have it."""
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        fastest = min(self.seconds)
        return {"median_s": median, "quartiles_s": [low, high], "fastest_s": fastest, "runs": len(self.seconds)}


def measure(
    calls: dict[str, Callable[[int], object]],
    device: torch.device | str = "cpu",
    rounds: int = 7,
    on_block: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times every one of ``calls`` in each of ``rounds`` rounds; ``on_block`` hears of each, for a progress bar."""
    block = _cuda_block if torch.device(device).type == "cuda" else _cpu_block
    repeats = {name: _warm_up(call, block) for name, call in calls.items()}
    timings = {name: Timing() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timings[name].seconds.append(block(call, repeats[name]))
            on_block()
    return timings


def ratio(theirs: list[float], ours: list[float]) -> dict[str, object]:
    """Of times in the same rounds: the median quotient, its quartiles, its relative standard error.

    The error is a median's under a normal distribution, 1.2533 s / sqrt(n), with s from the quartiles (1.349 s apart),
    so that a few disturbed rounds count for little.
    """
    low, median, high = statistics.quantiles(
        [t / o for t, o in zip(theirs, ours, strict=True)], n=4, method="inclusive"
    )
    error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(theirs)) / median
    return {"ratio": median, "ratio_quartiles": [low, high], "ratio_error": error}


def copies_past_cache(bytes_per_call: int, device: torch.device | str = "cpu") -> int:
    """How many sets of inputs it takes that the first is out of the cache when its turn comes again."""
    if torch.device(device).type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 32 << 20
    return max(2, min(MAX_COPIES, 2 * cache // max(1, bytes_per_call) + 1))


def _warm_up(call: Callable[[int], object], block: Callable[[Callable[..., Any], int], float]) -> int:
    """Returns how many calls make a block."""
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

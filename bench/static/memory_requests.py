"""What a warp's requests cost the L1: wavefronts with their bank conflicts, and sectors of device memory.

Shared memory has 32 banks of 4 bytes; a wavefront serves each bank once, whichever threads want the same word.
Requests of 8 and 16 bytes a thread are served half a warp and a quarter of one at a time, a matrix of LDSM and STSM
eight rows of 16 bytes at a time. A request for device memory takes a wavefront for every four sectors of 32 bytes: the
tags of four lines are looked up in a cycle, and 128 bytes returned (NVIDIA's forum, "How does the LSU execute
load/store instructions in the Ampere architecture", 273699).
"""

from __future__ import annotations

import re

import numpy as np
from assembly import Sass

WARP, BANKS, LINE = 32, 32, 128
SECTOR, SECTORS = 32, 4  # bytes; of a wavefront


def bytes_of_thread(one: Sass) -> int:
    """That a thread asks for."""
    if one.opcode in ("LDSM", "STSM"):
        return 16
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", one.name)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


def asking_lanes(one: Sass) -> int:
    """Threads of a warp whose addresses count."""
    if one.opcode not in ("LDSM", "STSM"):
        return WARP
    return 8 * int((re.search(r"\.(\d)$", one.name) or "11")[1])


def shared_wavefronts(addresses: np.ndarray, active: np.ndarray, size: int) -> np.ndarray:
    """Of each part of a warp that is served at a time: a whole one, halves or quarters.

    ``addresses``, ``active``: one for each thread, whole warps; ``size``: bytes of a thread.
    """
    words = max(1, size // 4)
    lanes = WARP // words
    first = (addresses >> 2).astype(np.int64).reshape(-1, lanes, 1)
    asked = np.where(active.reshape(-1, lanes, 1), first + np.arange(words), -1).reshape(-1, lanes * words)
    return _most_of_a_bank(asked)


def _most_of_a_bank(words: np.ndarray) -> np.ndarray:
    """For each row, the most different words of one bank; -1 is none."""
    ordered = np.sort(words, axis=1)
    fresh = np.ones(ordered.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    fresh &= ordered >= 0
    rows = np.broadcast_to(np.arange(len(words))[:, None], ordered.shape)
    counts = np.bincount((rows * BANKS + ordered % BANKS)[fresh], minlength=len(words) * BANKS)
    return counts.reshape(-1, BANKS).max(axis=1)


def device_wavefronts(addresses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(wavefronts, sectors) of each warp."""
    numbers = (addresses >> np.uint64(SECTOR.bit_length() - 1)).astype(np.int64)
    ordered = np.sort(np.where(active, numbers, -1).reshape(-1, WARP), axis=1)
    fresh = np.ones(ordered.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    sectors = (fresh & (ordered >= 0)).sum(axis=1)
    return -(-sectors // SECTORS), sectors

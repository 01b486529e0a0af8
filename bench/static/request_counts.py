"""What the requests cost of several programs that run side by side: counted by instruction and program.

Requests that lie alike, seen from the first address of each program, cost alike: memory_requests.py is asked once for
each such pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import memory_requests as requests
import numpy as np
from assembly import Sass
from memory_requests import WARP

_SHIFT = np.uint64(requests.SECTOR.bit_length() - 1)
_NUMBERS = np.uint64((1 << 64 - int(_SHIFT)) - 1)  # of sectors; above them stands the program
# Stands for the address of a lane that does not ask, by bytes of an address.
_NOWHERE = {4: np.uint32(1 << 31), 8: np.uint64(1 << 63)}


@dataclass(frozen=True)
class _Cost:
    """Of a pattern, by program. ``reached``: sectors of device memory, from the base; ``owners``: whose they are."""

    number: int
    warps: np.ndarray
    wavefronts: np.ndarray
    sectors: np.ndarray
    reached: np.ndarray
    owners: np.ndarray


class RequestCounts:
    """``requests`` (of warps), ``wavefronts``, ``sectors``: arrays of instructions times programs."""

    def __init__(self, instructions: Sequence[Sass], programs: int, lanes: int) -> None:
        self._instructions, self._programs = instructions, programs
        self._first_lanes = np.arange(programs) * (lanes // programs)
        self._lane = np.arange(lanes) % WARP
        self.requests, self.wavefronts, self.sectors = np.zeros((3, len(instructions), programs), np.int64)
        self._kinds: dict[int, tuple[int, np.ndarray | None]] = {}
        self._costs: dict[tuple, _Cost] = {}
        self._seen: set[tuple[int, bytes]] = set()
        self._reached: list[np.ndarray] = [np.zeros(0, np.uint64)]

    def ask(self, number: int, addresses: np.ndarray, active: np.ndarray) -> None:
        """Instruction ``number`` asks in ``active`` lanes; addresses of device memory have 64 bits."""
        size, counting = self._kind(number)
        if counting is not None:
            active = active & counting
        first = self._first_lanes + active.reshape(self._programs, -1).argmax(1)
        base = addresses[first] & ~addresses.dtype.type(requests.LINE - 1)
        offsets = (addresses.reshape(self._programs, -1) - base[:, None]).reshape(-1)
        key = size, np.where(active, offsets, _NOWHERE[addresses.itemsize]).tobytes()
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = self._cost(size, addresses, offsets, active)
        self.requests[number] += cost.warps
        self.wavefronts[number] += cost.wavefronts
        self.sectors[number] += cost.sectors
        if len(cost.owners):
            self._remember(cost, base)

    def different_sectors(self) -> list[np.ndarray]:
        """Numbers of the sectors of device memory that each program asks for, in order."""
        every = _different(np.concatenate(self._reached))
        bounds = [np.uint64(program) << (np.uint64(64) - _SHIFT) for program in range(1, self._programs)]
        return [part & _NUMBERS for part in np.split(every, np.searchsorted(every, np.array(bounds, np.uint64)))]

    def _kind(self, number: int) -> tuple[int, np.ndarray | None]:
        """(bytes of a thread, the lanes whose addresses count if not all do)."""
        if number not in self._kinds:
            one = self._instructions[number]
            asking = requests.asking_lanes(one)
            self._kinds[number] = requests.bytes_of_thread(one), self._lane < asking if asking < WARP else None
        return self._kinds[number]

    def _cost(self, size: int, addresses: np.ndarray, offsets: np.ndarray, active: np.ndarray) -> _Cost:
        programs = self._programs
        warps = active.reshape(programs, -1, WARP).any(2).sum(1)
        if addresses.dtype != np.uint64:
            wavefronts = requests.shared_wavefronts(addresses, active, size).reshape(programs, -1).sum(1)
            nothing = np.zeros(programs, np.int64)
            return _Cost(len(self._costs), warps, wavefronts, nothing, np.zeros(0, np.uint64), np.zeros(0, np.int64))
        wavefronts, sectors = requests.device_wavefronts(addresses, active)
        owner = np.flatnonzero(active) // (len(active) // programs)
        each = _different(offsets[active] >> _SHIFT | owner.astype(np.uint64) << (np.uint64(64) - _SHIFT))
        owners = (each >> (np.uint64(64) - _SHIFT)).astype(np.int64)
        wavefronts, sectors = (one.reshape(programs, -1).sum(1) for one in (wavefronts, sectors))
        return _Cost(len(self._costs), warps, wavefronts, sectors, each & _NUMBERS, owners)

    def _remember(self, cost: _Cost, base: np.ndarray) -> None:
        key = cost.number, base.tobytes()
        if key not in self._seen:
            self._seen.add(key)
            reached = cost.reached + (base >> _SHIFT)[cost.owners] & _NUMBERS
            self._reached.append(reached | cost.owners.astype(np.uint64) << (np.uint64(64) - _SHIFT))


def _different(numbers: np.ndarray) -> np.ndarray:
    """As np.unique, which is slower."""
    ordered = np.sort(numbers)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered

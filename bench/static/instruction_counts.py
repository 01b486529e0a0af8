"""What one program of a launch executes, by pipe: its machine code, run by warp.py, each instruction counted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from assembly import code_of
from machine_code import Chain, float_operations, load_cycles, multiply_adds, pipe, wavefronts_alone
from warp import Launch, Machine, Run

# Threads that are run at once: with more, arrays leave the processor's caches.
LANES = 8192
# A launch, some of its programs, cycles of a load from global memory.
Asked = tuple[Launch, tuple[tuple[int, ...], ...], int]


@dataclass(frozen=True)
class Executed:
    """Of one program. ``pipes``: instructions of warps; ``wavefronts``: of the L1; multiply-adds of tensor cores:
    ``mma`` by instructions of one warp, ``tensor`` by those of a group of warps.

    ``chain``: cycles that its warps need with nobody else on the processor, the slowest between any two barriers.
    ``pipes`` has every instruction that is issued; ``opcodes`` leaves out requests, products and barriers whose guard
    is off in a whole warp, which keep no unit busy. ``operations``: float32 ones of a warp on average, two for a
    multiply-add; ``conflicts``: wavefronts beyond the least; ``sectors``: different ones of device memory, and
    ``requested_sectors`` as often as a request of a warp touches them.
    """

    pipes: Mapping[str, float]
    tensor: float
    wavefronts: float
    chain: float
    mma: float = 0.0
    operations: float = 0.0
    conflicts: float = 0.0
    sectors: float = 0.0
    requested_sectors: float = 0.0
    opcodes: Mapping[str, int] | None = None

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())


class Kernel:
    """A compiled kernel for ``arch``, to be counted for many launches. ``constants``: what lies in constant bank 2."""

    def __init__(self, disassembly: str, arch: int, name: str | None = None, constants: bytes = b"") -> None:
        self.machine = Machine(code_of(disassembly, name), arch, constants)
        instructions = self.machine.instructions
        self._pipes = _numbered([pipe(one) for one in instructions])
        self._opcodes = _numbered([one.opcode for one in instructions])
        self._alone = np.array([wavefronts_alone(one) for one in instructions])
        self._tensor = np.array([multiply_adds(one) for one in instructions])
        self._of_groups = np.array([one.opcode != "HMMA" for one in instructions])
        self._floats = np.array([float_operations(one) for one in instructions])
        self._sizes = [len(block.instructions) for block in self.machine.code.blocks]
        self._followed = np.isin(np.arange(len(instructions)), [*self.machine.followed])
        self._executed: dict[Asked, tuple[Executed, ...]] = {}
        self._guarded = np.isin(np.arange(len(instructions)), [*self.machine.guarded])

    def executed(
        self, launch: Launch, programs: Sequence[Sequence[int]], load: int | None = None
    ) -> tuple[Executed, ...]:
        """What each of ``programs`` executes. ``load``: cycles of a load from global memory."""
        asked = launch, tuple(map(tuple, programs)), load_cycles(in_l2=1) if load is None else load
        self.prepare([asked])
        return self._executed[asked]

    def prepare(self, asked: Iterable[Asked]) -> None:
        """Run what ``executed`` will be asked for, side by side: that takes less time than one after another."""
        todo: dict[int, list[Asked]] = {}
        for one in dict.fromkeys(asked):
            if one not in self._executed:
                todo.setdefault(one[0].threads, []).append(one)
        for threads, several in todo.items():
            at_once = max(1, LANES // (threads * max(len(programs) for _, programs, _ in several)))
            for first in range(0, len(several), at_once):
                self._run(several[first : first + at_once])

    def _run(self, asked: Sequence[Asked]) -> None:
        """One that cannot be followed leaves the others to be run one by one."""
        try:
            runs = iter(self.machine.run([(launch, one) for launch, programs, _ in asked for one in programs]))
        except ValueError:
            if len(asked) == 1:
                raise
            return
        for one in asked:
            self._executed[one] = tuple(self._of(next(runs), one[2]) for _ in one[1])

    def _of(self, run: Run, load: int) -> Executed:
        times = np.repeat(run.entered, self._sizes)
        ran = self._ran(run, times)
        wavefronts, conflicts = self._wavefronts(run, ran)
        return Executed(
            pipes={name: float(count) for name, count in _sums(self._pipes, times).items()},
            tensor=float(ran @ (self._tensor * self._of_groups)),
            wavefronts=float(wavefronts),
            chain=self._chain(run, load),
            mma=float(ran @ (self._tensor * ~self._of_groups)),
            operations=float(times @ self._floats) / run.took_part.shape[1],
            conflicts=float(conflicts),
            sectors=float(len(run.asked)),
            requested_sectors=float(run.sectors.sum()),
            opcodes=_sums(self._opcodes, ran),
        )

    def _ran(self, run: Run, times: np.ndarray) -> np.ndarray:
        """How often each instruction ran in some thread of a warp, where its guard is known; else it always did."""
        ran = np.where(self._followed, run.requests, times)
        return np.where(self._guarded, run.passed, ran)

    def _wavefronts(self, run: Run, ran: np.ndarray) -> tuple[int, int]:
        """(all, those beyond the least). A request whose address is not known is taken to meet no conflict."""
        least = ran * self._alone
        total = np.where(self._followed, run.wavefronts, least)
        return int(total.sum()), int(np.maximum(total - least, 0).sum())

    def _chain(self, run: Run, load: int) -> float:
        """Between two barriers the slowest warp decides."""
        passed = {tuple(run.blocks[run.took_part[:, warp]].tolist()) for warp in range(run.took_part.shape[1])}
        stretches = [self._chains(load).cycles(one) for one in passed]
        return float(sum(max(several) for several in itertools.zip_longest(*stretches, fillvalue=0)))

    @functools.cache  # noqa: B019
    def _chains(self, load: int) -> Chain:
        return Chain(self.machine.code.blocks, load)


def _numbered(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different names, in the order of their first place, and the number of each one's."""
    different = list(dict.fromkeys(names))
    numbers = {name: number for number, name in enumerate(different)}
    return different, np.array([numbers[name] for name in names])


def _sums(numbered: tuple[list[str], np.ndarray], counts: np.ndarray) -> dict[str, int]:
    """The sum of ``counts`` of each name, where it is not 0."""
    names, numbers = numbered
    sums = np.bincount(numbers, counts, len(names)).astype(np.int64).tolist()
    return {name: count for name, count in zip(names, sums, strict=True) if count}

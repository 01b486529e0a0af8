"""What one program of a launch executes, by pipe: its machine code, run by warp.py, each instruction counted."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from assembly import code_of
from machine_code import Chain, float_operations, load_cycles, multiply_adds, pipe, wavefronts_alone
from warp import Launch, Machine, Run


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
        self._pipes = [pipe(one) for one in instructions]
        self._alone = np.array([wavefronts_alone(one) for one in instructions])
        self._tensor = np.array([multiply_adds(one) for one in instructions])
        self._of_groups = np.array([one.opcode != "HMMA" for one in instructions])
        self._floats = np.array([float_operations(one) for one in instructions])
        self._sizes = [len(block.instructions) for block in self.machine.code.blocks]

    def executed(self, launch: Launch, program: Sequence[int], load: int | None = None) -> Executed:
        """What ``program`` executes. ``load``: cycles of a load from global memory."""
        return self._executed(launch, tuple(program), load_cycles(in_l2=1) if load is None else load)

    @functools.cache  # noqa: B019
    def _executed(self, launch: Launch, program: tuple[int, ...], load: int) -> Executed:
        run = self.machine.run(launch, program)
        warps = run.entered.shape[1]
        times = np.repeat(run.entered.sum(axis=1), self._sizes)
        pipes: Counter[str] = Counter()
        opcodes: Counter[str] = Counter()
        ran = self._ran(run, times)
        for one, unit, issued, count in zip(
            self.machine.instructions, self._pipes, times.tolist(), ran.tolist(), strict=True
        ):
            pipes[unit] += issued
            opcodes[one.opcode] += count
        wavefronts, conflicts = self._wavefronts(run, ran)
        return Executed(
            pipes={name: float(count) for name, count in pipes.items() if count},
            tensor=float(ran @ (self._tensor * self._of_groups)),
            wavefronts=float(wavefronts),
            chain=self._chain(run, load),
            mma=float(ran @ (self._tensor * ~self._of_groups)),
            operations=float(times @ self._floats) / warps,
            conflicts=float(conflicts),
            sectors=float(run.different_sectors()),
            requested_sectors=float(run.sectors.total()),
            opcodes={name: count for name, count in opcodes.items() if count},
        )

    def _ran(self, run: Run, times: np.ndarray) -> np.ndarray:
        """How often each instruction ran in some thread of a warp, where its guard is known; else it always did."""
        ran = times.copy()
        for numbers, counts in ((self.machine.followed, run.requests), (self.machine.guarded, run.passed)):
            for number in numbers:
                ran[number] = counts[number]
        return ran

    def _wavefronts(self, run: Run, ran: np.ndarray) -> tuple[int, int]:
        """(all, those beyond the least). A request whose address is not known is taken to meet no conflict."""
        followed = np.zeros(len(ran), bool)
        followed[list(self.machine.followed)] = True
        found = np.zeros(len(ran), np.int64)
        for number, count in run.wavefronts.items():
            found[number] = count
        least = ran * self._alone
        total = np.where(followed, found, least)
        return int(total.sum()), int(np.maximum(total - least, 0).sum())

    def _chain(self, run: Run, load: int) -> float:
        """Between two barriers the slowest warp decides."""
        blocks = np.array([block for block, _ in run.trace])
        took_part = np.array([warps for _, warps in run.trace])
        passed = {tuple(blocks[took_part[:, warp]].tolist()) for warp in range(took_part.shape[1])}
        stretches = [self._chains(load).cycles(one) for one in passed]
        return float(sum(max(several) for several in itertools.zip_longest(*stretches, fillvalue=0)))

    @functools.cache  # noqa: B019
    def _chains(self, load: int) -> Chain:
        return Chain(self.machine.code.blocks, load)

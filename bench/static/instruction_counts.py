"""What one program of a launch executes, by pipe: its machine code, run by warp.py, each instruction counted."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from machine_code import Chain, floats, load_cycles, multiply_adds, pipe, wavefronts_alone
from sass import code_of
from warp import Launch, Machine, Run


@dataclass(frozen=True)
class Executed:
    """Of one program. ``pipes``: instructions of warps; ``tensor``: multiply-adds; ``wavefronts``: of the L1.

    ``chain``: cycles that its warps need with nobody else on the processor, the slowest between any two barriers.
    ``opcodes``: instructions of warps by opcode; ``floats``: float32 multiply-adds, products and sums of a warp on
    average; ``conflicts``: wavefronts beyond the least; ``sectors``: of device memory that are asked for.
    """

    pipes: Mapping[str, float]
    tensor: float
    wavefronts: float
    chain: float
    floats: float = 0.0
    conflicts: float = 0.0
    sectors: float = 0.0
    opcodes: Mapping[str, int] | None = None

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())


class Kernel:
    """A compiled kernel for ``arch``, to be counted for many launches."""

    def __init__(self, disassembly: str, arch: int, name: str | None = None) -> None:
        self.machine = Machine(code_of(disassembly, name), arch)
        instructions = self.machine.instructions
        self._pipes = [pipe(one) for one in instructions]
        self._alone = np.array([wavefronts_alone(one) for one in instructions])
        self._tensor = np.array([multiply_adds(one) for one in instructions])
        self._floats = np.array([floats(one) for one in instructions])
        self._sizes = [len(block.instructions) for block in self.machine.code.blocks]

    def executed(self, launch: Launch, program: Sequence[int], load: int | None = None) -> Executed:
        """What ``program`` executes. ``load``: cycles of a load from global memory."""
        run = self.machine.run(launch, program)
        warps = run.entered.shape[1]
        times = np.repeat(run.entered.sum(axis=1), self._sizes)
        pipes: Counter[str] = Counter()
        opcodes: Counter[str] = Counter()
        for one, unit, count in zip(self.machine.instructions, self._pipes, times.tolist(), strict=True):
            pipes[unit] += count
            opcodes[one.opcode] += count
        wavefronts, conflicts = self._wavefronts(run, times)
        return Executed(
            {name: float(count) for name, count in pipes.items() if count},
            float(times @ self._tensor),
            float(wavefronts),
            self._chain(run, load_cycles(in_l2=1) if load is None else load),
            float(times @ self._floats) / warps,
            float(conflicts),
            float(sum(run.sectors.values())),
            {name: count for name, count in opcodes.items() if count},
        )

    def _wavefronts(self, run: Run, times: np.ndarray) -> tuple[int, int]:
        """(all, those beyond the least). A request whose address is not known is taken to meet no conflict."""
        followed = np.zeros(len(times), bool)
        followed[list(self.machine.followed)] = True
        found = np.zeros(len(times), np.int64)
        asked = np.zeros(len(times), np.int64)
        for number, count in run.wavefronts.items():
            found[number] = count
        for number, count in run.requests.items():
            asked[number] = count
        least = np.where(followed, asked, times) * self._alone
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

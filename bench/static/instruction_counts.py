"""What one program of a launch executes, by pipe: machine code times the trips of its loops.

The trips come from PTX (executed.py), the instructions from machine code (machine_code.py); loops.py says which loop
is which. A loop that the assembler unrolled holds more arithmetic than its PTX, and runs as many times less; what is
left over counts as often as what is around it. Blocks of a loop that not every trip passes count as often as those of
its PTX do on average.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from executed import Ptx
from loops import Loop, align, loops
from machine_code import Block, blocks_of, load_cycles

_FLOATS = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2")


@dataclass(frozen=True)
class Executed:
    """Of one program. ``pipes``: instructions of warps; ``tensor``: multiply-adds; ``wavefronts``: of the L1.

    ``chain``: cycles that its slowest warp needs with nobody else on the processor. ``floats``: float32 multiply-adds,
    products and sums of a warp, by machine code; ``floats_of_ptx``: the same by PTX, of which every block is counted:
    the two agree where the loops were found.
    """

    pipes: Mapping[str, float]
    tensor: float
    wavefronts: float
    chain: float
    floats: float
    floats_of_ptx: float

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())


class Kernel:
    """A compiled kernel, to be counted for many launches. ``code``: the loops of its machine code."""

    def __init__(self, ptx: str, disassembly: str, ptx_name: str | None = None) -> None:
        self.ptx = Ptx(ptx, ptx_name)
        self.blocks = blocks_of(disassembly, ptx_name)
        whole_ptx = loops(self.ptx.graph())
        whole = loops([block.next for block in self.blocks])
        self._pairs = align(whole, whole_ptx, self._weight, self._weight_of_ptx)
        self.code = whole
        self._cycles_by_load: dict[int, list[int]] = {}

    def executed(
        self,
        arguments: Mapping[str, int],
        program: Sequence[int],
        grid: Sequence[int],
        threads: int,
        warps: Sequence[int] = (0,),
        load: int | None = None,
    ) -> Executed:
        """What ``program`` executes. ``warps``: those whose first threads are run; they stand for the others.

        ``load``: cycles of a load from global memory.
        """
        pipes: Counter[str] = Counter()
        tensor = wavefronts = chain = floats = floats_of_ptx = 0.0
        share = -(-threads // 32) / len(warps)
        cycles = self._cycles(load_cycles(in_l2=1) if load is None else load)
        for warp in warps:
            entered = self.ptx.counts(arguments, tuple(program), tuple(grid), 32 * warp, threads)
            floats_of_ptx += sum(n * count for n, count in zip(self._ptx_floats, entered, strict=True)) / len(warps)
            own_chain = 0.0
            for times, block in self._times(entered):
                for pipe, count in self._pipes(block).items():
                    pipes[pipe] += times * count * share
                tensor += times * self._tensor[block] * share
                wavefronts += times * self._wavefronts[block] * share
                floats += times * self._floats[block] / len(warps)
                own_chain += times * cycles[block]
            chain = max(chain, own_chain)
        return Executed(dict(pipes), tensor, wavefronts, chain, floats, floats_of_ptx)

    def _times(self, entered: list[int]) -> list[tuple[float, int]]:
        """(executions, block) of every block of machine code."""
        trips: dict[int, tuple[float, float]] = {}
        for loop, loop_of_ptx in self._pairs:
            found = float(max((entered[block] for block in loop_of_ptx.own), default=1))
            sometimes = self._sometimes(loop_of_ptx, entered, found)
            ratio = (self._own_weight(loop) or 1) / (self._own_weight_of_ptx(loop_of_ptx) or 1)
            if loop.header >= 0 and not loop.inner and ratio >= 1.8:
                found, sometimes = found / round(ratio), sometimes / round(ratio)
            trips[loop.header] = found, sometimes
        result: list[tuple[float, int]] = []
        self._walk(self.code, (1.0, 1.0), trips, result)
        return result

    def _sometimes(self, loop: Loop, entered: list[int], otherwise: float) -> float:
        """How often the blocks run that not every trip of a loop of the PTX passes."""
        blocks = [(entered[block], len(self.ptx.blocks[block].instructions)) for block in loop.own - loop.always]
        size = sum(length for _, length in blocks)
        return sum(times * length for times, length in blocks) / size if size else otherwise

    def _walk(
        self,
        loop: Loop,
        outside: tuple[float, float],
        trips: Mapping[int, tuple[float, float]],
        result: list[tuple[float, int]],
    ) -> None:
        always, sometimes = trips.get(loop.header, outside)
        result += [(always if block in loop.always else sometimes, block) for block in loop.own]
        for inner in loop.inner:
            self._walk(inner, (always, sometimes), trips, result)

    def _weight(self, loop: Loop) -> float:
        return 1 + sum(self._floats[block] for block in loop.blocks)

    def _weight_of_ptx(self, loop: Loop) -> float:
        return 1 + sum(self._ptx_floats[block] for block in loop.blocks)

    def _own_weight(self, loop: Loop) -> float:
        return sum(self._floats[block] for block in loop.own)

    def _own_weight_of_ptx(self, loop: Loop) -> float:
        return sum(self._ptx_floats[block] for block in loop.own)

    @functools.cached_property
    def _floats(self) -> list[float]:
        return [
            sum(2.0 if i.opcode.endswith("2") else 1.0 for i in block.instructions if i.opcode in _FLOATS)
            for block in self.blocks
        ]

    @functools.cached_property
    def _ptx_floats(self) -> list[float]:
        return [sum(_is_float(i.name) for i in block.instructions) for block in self.ptx.blocks]

    def _cycles(self, load: int) -> list[int]:
        if load not in self._cycles_by_load:
            self._cycles_by_load[load] = [block.cycles(load) for block in self.blocks]
        return self._cycles_by_load[load]

    @functools.cached_property
    def _tensor(self) -> list[int]:
        return [sum(i.multiply_adds for i in block.instructions) for block in self.blocks]

    @functools.cached_property
    def _wavefronts(self) -> list[int]:
        return [sum(i.wavefronts for i in block.instructions) for block in self.blocks]

    @functools.cached_property
    def _counted(self) -> list[Counter[str]]:
        return [Block.pipes(block) for block in self.blocks]

    def _pipes(self, block: int) -> Counter[str]:
        return self._counted[block]


def _is_float(name: str) -> float:
    base, *suffixes = name.split(".")
    if base not in ("fma", "mul", "add", "sub"):
        return 0.0
    return 2.0 if "f32x2" in suffixes else float("f32" in suffixes)

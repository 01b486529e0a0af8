"""What an instruction of machine code costs: the pipe that executes it, its turns of the L1, its latency.

A pipe is the unit that executes an instruction; `PIPES` says which, from the instruction's name (CUDA Binary
Utilities, "Instruction Set Reference"). `Chain` lets one warp issue its instructions in order and wait for what it
reads, as the hardware does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from assembly import Block, Sass
from memory_requests import asking_lanes, bytes_of_thread

# First letters of an instruction's name -> pipe; the longest that fits.
PIPES = {
    "FFMA": "fma", "FMUL": "fma", "FADD": "fma", "IMAD": "fma", "FSWZADD": "fma", "HFMA2": "fma", "HADD2": "fma",
    "HMUL2": "fma", "FHFMA": "fma", "FHADD": "fma", "UIMAD": "uniform", "MUFU": "special", "I2F": "special",
    "F2I": "special", "F2F": "special", "I2FP": "alu", "F2FP": "alu", "POPC": "special", "FLO": "special",
    "LD": "memory", "ST": "memory", "ATOM": "memory", "RED": "memory", "SHFL": "memory", "MATCH": "memory",
    "HMMA": "tensor", "HGMMA": "tensor", "IMMA": "tensor", "UTCHMMA": "tensor", "UTC": "tensor", "BAR": "control",
    "BRA": "control", "EXIT": "control", "NOP": "control", "BSSY": "control", "BSYNC": "control",
    "BREAK": "control", "WARP": "control", "DEPBAR": "control", "MEMBAR": "control", "FENCE": "control",
    "CCTL": "control", "ERRBAR": "control", "CALL": "control", "RET": "control", "YIELD": "control",
    "ENDCOLLECTIVE": "control", "SYNCS": "memory", "LDC": "constant", "LDCU": "constant", "R2UR": "alu",
    "S2R": "special", "S2UR": "special", "CS2R": "alu", "ULDC": "constant", "LDGDEPBAR": "control",
    "LDSM": "memory", "LDTM": "memory", "STTM": "memory", "U": "uniform", "IADD": "alu", "LOP3": "alu",
    "SHF": "alu", "LEA": "alu", "ISETP": "alu", "SEL": "alu", "MOV": "alu", "PRMT": "alu", "VIADD": "alu",
    "VIMNMX": "alu", "IMNMX": "alu", "IABS": "alu", "PLOP3": "alu", "FSETP": "alu", "FSEL": "alu", "FMNMX": "alu",
    "FCHK": "alu", "HMNMX2": "alu", "HSETP2": "alu", "HSET2": "alu", "FSET": "alu", "ISET": "alu", "P2R": "alu",
    "R2P": "alu", "BMSK": "alu", "SGXT": "alu", "VOTE": "alu", "BMOV": "control", "I2I": "alu", "ISCADD": "alu",
    "VABSDIFF": "alu", "BREV": "special", "NANOSLEEP": "control", "ACQBULK": "control", "PREEXIT": "control",
    "ELECT": "alu", "FRND": "special", "DADD": "special", "DMUL": "special", "DFMA": "special", "DSETP": "special",
    "ARRIVES": "control", "BRX": "control", "KILL": "control", "REDUX": "alu", "CGAERRBAR": "control",
    "UCGABAR": "control", "R2B": "alu", "B2R": "alu", "LEPC": "alu", "BPT": "control",
}  # fmt: skip

# Cycles until a result can be read: microbenchmarks of Volta to Hopper agree within one or two (Jia et al.,
# arXiv:1804.06826; Luo et al., arXiv:2402.13499).
LATENCY = {"fma": 4, "alu": 5, "uniform": 8, "special": 20, "tensor": 33, "constant": 30, "control": 2}
SHARED, SHUFFLE, BARRIER = 26, 24, 30
# Of a load from global memory that the L1 answers, or the L2, or memory.
LOADS = (33, 270, 700)
_FLOATS = {"FFMA": 2, "FMUL": 1, "FADD": 1, "FFMA2": 4, "FMUL2": 2, "FADD2": 2, "FHFMA": 2}


def load_cycles(in_l2: float) -> int:
    """Of a load on average: half are of what the warp has just read; ``in_l2`` of the others come from the L2."""
    l1, l2, memory = LOADS
    return round((l1 + in_l2 * l2 + (1 - in_l2) * memory) / 2)


def pipe(one: Sass) -> str:
    """The unit that executes an instruction.

    Raises:
        ValueError: `PIPES` does not know it.
    """
    if (found := _pipe(one.opcode)) is None:
        raise ValueError(f"`{one.text}`: which pipe executes {one.opcode} is not in machine_code.PIPES")
    return found


@functools.cache
def _pipe(opcode: str) -> str | None:
    return next((PIPES[opcode[:n]] for n in range(len(opcode), 0, -1) if opcode[:n] in PIPES), None)


def wavefronts_alone(one: Sass) -> int:
    """Turns of the L1 that a warp's request takes if it meets no conflict."""
    if pipe(one) != "memory":
        return 0
    return max(1, bytes_of_thread(one) * asking_lanes(one) // 128)


def multiply_adds(one: Sass) -> int:
    """Of a tensor core instruction, for the whole warp, or for the warp of a group that issues it."""
    if found := re.match(r"[HI]G?MMA\.(\d+)x(\d+)x(\d+)", one.name):
        m, n, k = map(int, found.groups())
        return m * n * k // 4  # each of the group's four warps issues it
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)", one.name):
        m, n, k = map(int, found.groups())
        return m * n * k
    return 0


def float_operations(one: Sass) -> int:
    """Float32 products and sums of a thread. Half of a product (.D2) is one more."""
    return _FLOATS.get(one.opcode, 0) + (one.name == "FMUL.D2")


def latency(one: Sass, load: int) -> int:
    """Cycles; ``load`` for what reads global memory."""
    unit = pipe(one)
    if unit != "memory":
        return BARRIER if one.opcode == "BAR" else LATENCY[unit]
    if one.opcode.startswith(("LDS", "STS")):
        return SHARED
    return SHUFFLE if one.opcode == "SHFL" else load


_Pending = tuple[tuple[int, int], ...]  # (register, cycles until it can be read)


class Chain:
    """What a warp alone needs for the blocks it passes. ``load``: cycles of a load from global memory.

    What a block takes depends on the results that it finds pending, so that each is gone through once for each such
    state: loops settle in one.
    """

    def __init__(self, blocks: Iterable[Block], load: int) -> None:
        self._blocks = [
            [(_numbers(one.reads | one.guards), _numbers(one.writes), latency(one, load), one.opcode == "BAR")
             for one in block.instructions]
            for block in blocks
        ]  # fmt: skip
        self._states: dict[_Pending, int] = {(): 0}
        self._pending: list[_Pending] = [()]
        self._passed: dict[tuple[int, int], tuple[int, list[int]]] = {}

    def cycles(self, passed: Iterable[int]) -> tuple[int, ...]:
        """Of each stretch between two barriers of the program; ``passed``: blocks, in order."""
        return self._cycles(tuple(passed))

    @functools.lru_cache(256)  # noqa: B019
    def _cycles(self, passed: tuple[int, ...]) -> tuple[int, ...]:
        stretches, now, state = [], 0, 0
        known = self._passed
        for block in passed:
            found = known.get((state, block))
            if found is None:
                found = known[state, block] = self._through(state, block)
            state, (first, *others) = found
            now += first
            if others:
                stretches += [now, *others[:-1]]
                now = others[-1]
        return (*stretches, now)

    def _through(self, state: int, block: int) -> tuple[int, list[int]]:
        """(state behind a block, cycles until each of its barriers and until its end)."""
        ready = dict(self._pending[state])
        stretches, now, began = [], 0, 0
        get = ready.get
        for reads, writes, takes, is_barrier in self._blocks[block]:
            now += 1
            for register in reads:
                at = get(register, 0)
                if at > now:
                    now = at
            for register in writes:
                ready[register] = now + takes
            if is_barrier:
                now += BARRIER
                stretches.append(now - began)
                began = now
        pending = tuple(sorted((register, at - now) for register, at in ready.items() if at > now + 1))
        if pending not in self._states:
            self._states[pending] = len(self._pending)
            self._pending.append(pending)
        return self._states[pending], [*stretches, now - began]


def _numbers(registers: int) -> tuple[int, ...]:
    found = []
    while registers:
        lowest = registers & -registers
        found.append(lowest.bit_length() - 1)
        registers ^= lowest
    return tuple(found)

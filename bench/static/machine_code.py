"""The machine code of a kernel: its instructions by pipe, its blocks, and what a warp alone needs for one.

Reads what nvdisasm prints of a cubin. A pipe is the unit that executes an instruction; `PIPES` says which, from the
instruction's name (CUDA Binary Utilities, "Instruction Set Reference"). `latency` lets one warp issue a block in order
and wait for what it reads, as the hardware does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# First letters of an instruction's name -> pipe; the longest that fits. What is not listed goes to the ALU.
PIPES = {
    "FFMA": "fma", "FMUL": "fma", "FADD": "fma", "IMAD": "fma", "FSWZADD": "fma", "HFMA2": "fma", "HADD2": "fma",
    "HMUL2": "fma", "UIMAD": "uniform", "MUFU": "special", "I2F": "special", "F2I": "special", "F2F": "special",
    "I2FP": "alu", "F2FP": "alu", "POPC": "special", "FLO": "special", "LD": "memory", "ST": "memory",
    "ATOM": "memory", "RED": "memory", "SHFL": "memory", "MATCH": "memory", "HMMA": "tensor", "HGMMA": "tensor",
    "IMMA": "tensor", "UTCHMMA": "tensor", "UTC": "tensor", "BAR": "control", "BRA": "control", "EXIT": "control",
    "NOP": "control", "BSSY": "control", "BSYNC": "control", "WARP": "control", "DEPBAR": "control",
    "MEMBAR": "control", "FENCE": "control", "CCTL": "control", "ERRBAR": "control", "CALL": "control",
    "RET": "control", "YIELD": "control", "SYNCS": "memory", "LDC": "constant", "LDCU": "constant", "R2UR": "alu",
    "S2R": "special", "S2UR": "special", "CS2R": "alu", "ULDC": "constant", "LDGDEPBAR": "control",
    "LDSM": "memory", "LDTM": "memory", "STTM": "memory",
}  # fmt: skip

# Cycles until a result can be read: microbenchmarks of Volta to Hopper agree within one or two (Jia et al.,
# arXiv:1804.06826; Luo et al., arXiv:2402.13499).
LATENCY = {"fma": 4, "alu": 5, "uniform": 8, "special": 20, "tensor": 33, "constant": 30, "control": 2}
SHARED, SHUFFLE, BARRIER = 26, 24, 30
# Of a load from global memory that the L1 answers, or the L2, or memory.
LOADS = (33, 270, 700)


def load_cycles(in_l2: float) -> int:
    """Of a load on average: half are of what the warp has just read; ``in_l2`` of the others come from the L2."""
    l1, l2, memory = LOADS
    return round((l1 + in_l2 * l2 + (1 - in_l2) * memory) / 2)


@dataclass(frozen=True)
class Instruction:
    """``name`` with its suffixes, ``writes`` and ``reads``: numbers of registers."""

    name: str
    writes: tuple[int, ...]
    reads: tuple[int, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        opcode = self.opcode
        return next((PIPES[opcode[:n]] for n in range(len(opcode), 0, -1) if opcode[:n] in PIPES), "alu")

    @property
    def wavefronts(self) -> int:
        """Times the L1 is busy with a warp's request, of threads side by side: 128 bytes each."""
        if self.pipe != "memory":
            return 0
        if self.opcode in ("LDSM", "STSM"):
            return int((re.search(r"\.M88\.(\d)", self.name) or "11")[1])
        return {"64": 2, "128": 4}.get(self.width, 1)

    @property
    def width(self) -> str:
        found = re.search(r"\.(64|128)\b", self.name)
        return found[1] if found else "32"

    @property
    def multiply_adds(self) -> int:
        """Of a tensor core instruction, for the whole warp or warp group that issues it."""
        if found := re.match(r"[HI]G?MMA\.(\d+)x(\d+)x(\d+)", self.name):
            m, n, k = map(int, found.groups())
            return m * n * k // 4  # each of the group's four warps issues it
        if found := re.match(r"HMMA\.(16)(8)(16|8|4)", self.name):
            m, n, k = map(int, found.groups())
            return m * n * k
        return 0

    def latency(self, load: int) -> int:
        """Cycles; ``load`` for what reads global memory."""
        if self.pipe != "memory":
            return BARRIER if self.opcode == "BAR" else LATENCY[self.pipe]
        if self.opcode.startswith(("LDS", "STS")):
            return SHARED
        return SHUFFLE if self.opcode == "SHFL" else load


@dataclass
class Block:
    """Instructions that run one after another. ``next`` holds the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def pipes(self) -> Counter[str]:
        return Counter(instruction.pipe for instruction in self.instructions)

    def cycles(self, load: int) -> int:
        """That one warp needs for the block, with nobody else on the processor, if loads take ``load``."""
        ready: dict[int, int] = {}
        now = 0
        for instruction in self.instructions:
            now = max([now + 1, *(ready.get(register, 0) for register in instruction.reads)])
            for register in instruction.writes:
                ready[register] = now + instruction.latency(load)
            if instruction.opcode == "BAR":
                now += BARRIER
        return now


def blocks_of(disassembly: str, kernel: str | None = None) -> list[Block]:
    """The blocks of ``kernel``, or of the only one, as nvdisasm -c prints it."""
    text = _section(disassembly, kernel)
    # A block begins at a label, and behind a branch.
    labels, blocks, ends = {}, [Block()], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            predicate, name, operands = found.groups()
            blocks[-1].instructions.append(_instruction(name, operands))
            # Before Hopper some jumps out of a loop are written as calls that do not return.
            jumps_by_call = name.startswith("CALL") and "`(.L_" in operands
            if jumps_by_call or name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX"):
                ends.append((len(blocks) - 1, name, operands, bool(predicate) or "P" in operands.split("`")[0]))
                blocks.append(Block())
    for number in range(len(blocks) - 1):
        blocks[number].next = [number + 1]
    for number, name, operands, conditional in ends:
        following = blocks[number].next if conditional else []
        target = re.search(r"`\((\.L_[\w.]+)\)", operands)
        to = [labels[target[1]]] if name.startswith(("BRA", "CALL")) and target and target[1] in labels else []
        blocks[number].next = [*following, *(one for one in to if one != number or conditional)]
    return blocks


def _section(disassembly: str, kernel: str | None) -> str:
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", disassembly, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    if kernel is None and len(found) == 1:
        return next(iter(found.values()))
    if kernel not in found:
        raise ValueError(f"kernel: {kernel!r} is not among {', '.join(sorted(found))}")
    return found[kernel]


_WRITES_NOTHING = ("ST", "BAR", "BRA", "EXIT", "RED", "NOP", "DEPBAR", "MEMBAR", "FENCE", "LDGSTS", "ISETP", "FSETP")


def _instruction(name: str, operands: str) -> Instruction:
    first, _, rest = operands.partition(",")
    if name.startswith(_WRITES_NOTHING):
        first, rest = "", operands
    width = {"64": 2, "128": 4}.get((re.search(r"\.(64|128)\b", name) or ["", "32"])[1], 1)
    wide = width if name.startswith("LD") else 2 if ".WIDE" in name or ".64" in name else 1
    writes = [number + i for number in _registers(first) for i in range(wide)]
    reads = [*_registers(rest)]
    if name.startswith("ST"):
        # The stored value is the last operand, of several registers.
        reads += [reads[-1] + i for i in range(1, width)] if reads else []
    return Instruction(name, tuple(writes), tuple(reads))


def _registers(text: str) -> Iterable[int]:
    return [int(number) for number in re.findall(r"\bR(\d+)\b", text)]

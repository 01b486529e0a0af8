"""The machine code of a kernel as nvdisasm -c prints it: instructions with their operands, and the blocks they form.

A block ends where control may go elsewhere, where threads wait for each other, and before each place that a branch
leads to. Registers have numbers: R0..R254 first, then UR, P and UP; `bits` makes a set of them, as an int. Opcodes:
"CUDA Binary Utilities", "Instruction Set Reference"; what they compute is in semantics.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Where each kind of register begins in a set.
FIRST = {"R": 0, "UR": 256, "P": 512, "UP": 520}
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "CALL", "BSSY", "BSYNC", "BREAK", "KILL", "WARPSYNC")
_ALL_PREDICATES = {"PR": 0x7F << FIRST["P"], "UPR": 0x7F << FIRST["UP"]}
_REGISTER = re.compile(r"(?<![\w.])(UR|R|UP|P)(\d+)\b")


@dataclass(frozen=True)
class Sass:
    """An instruction: ``address``, ``guard`` (such as !P0), ``name`` with suffixes, ``operands``, and its ``text``."""

    address: int
    guard: str | None
    name: str
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    @property
    def opcode(self) -> str:
        return self.suffixes[0]

    @functools.cached_property
    def targets(self) -> tuple[tuple[str, int], ...]:
        """(operand, registers) of what it writes."""
        return tuple((one, _width(self, one)) for one in self.operands[: _target_count(self)] if _is_register(one))

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """Operands that it reads."""
        return self.operands[_target_count(self) :]

    @functools.cached_property
    def writes(self) -> int:
        return sum(bits(operand, width) for operand, width in self.targets)

    @functools.cached_property
    def reads(self) -> int:
        """Registers of its sources, two of each where a pair may be meant; without the guard."""
        found = 0
        for source in self.sources:
            found |= bits(source, _source_width(self, source))
        return found

    @functools.cached_property
    def guards(self) -> int:
        return bits(self.guard, 1) if self.guard else 0

    @property
    def label(self) -> str | None:
        """Where a branch leads to: a label, or an address as 0x10."""
        found = re.search(r"`\(([^)]+)\)|\b(0x[0-9a-f]+)$", " ".join(self.operands[-1:]))
        return (found[1] or found[2]) if found else None


@dataclass
class Block:
    """Instructions that run one after another. ``next``: blocks that may follow."""

    instructions: list[Sass] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """``blocks`` in the order of the text; ``at``: the block at an address, where one begins; labels as addresses."""

    blocks: Sequence[Block]
    at: dict[int, int]
    labels: dict[str, int]

    def target(self, instruction: Sass) -> int:
        """The block that a branch leads to.

        Raises:
            ValueError: it leads out of the kernel.
        """
        label = instruction.label or ""
        address = int(label, 16) if label.startswith("0x") else self.labels.get(label)
        if address not in self.at:
            raise ValueError(f"`{instruction.text}` leads to {label!r}, where no instruction of the kernel is")
        return self.at[address]


def bits(operand: str, width: int) -> int:
    """The set of the registers that an operand names, and of those behind them up to ``width``."""
    found = _ALL_PREDICATES.get(operand, 0)
    for kind, number in _REGISTER.findall(operand):
        first = FIRST[kind] + int(number)
        found |= ((1 << (1 if kind.endswith("P") else width)) - 1) << first
    return found


def code_of(disassembly: str, kernel: str | None = None) -> Code:
    """The machine code of ``kernel``, or of the only one.

    Raises:
        ValueError: there is no such kernel.
    """
    instructions, labels = _instructions(_section(disassembly, kernel))
    targets = set(labels.values()) | {
        int(one.label, 16) for one in instructions if one.opcode in _ENDS and (one.label or "").startswith("0x")
    }
    blocks: list[Block] = []
    at: dict[int, int] = {}
    for one in instructions:
        if not blocks or one.address in targets or blocks[-1].instructions[-1].opcode in _ENDS:
            at[one.address] = len(blocks)
            blocks.append(Block())
        blocks[-1].instructions.append(one)
    code = Code(blocks, at, labels)
    returns = [number + 1 for number, block in enumerate(blocks) if block.instructions[-1].opcode == "CALL"]
    for number, block in enumerate(blocks):
        block.next = [one for one in _following(code, number, returns) if one < len(blocks)]
    return code


def _following(code: Code, number: int, returns: list[int]) -> list[int]:
    last = code.blocks[number].instructions[-1]
    falls = [number + 1]
    if last.opcode == "BRA" and _skips_the_slow_division(code.blocks[number]):
        return [code.target(last)]
    if last.opcode in ("BRA", "CALL"):
        return [code.target(last), *(falls if is_conditional(last) else [])]
    if last.opcode == "RET":
        return [*returns, *(falls if last.guard else [])]
    if last.opcode == "EXIT":
        return falls if is_conditional(last) else []
    return falls


def _skips_the_slow_division(block: Block) -> bool:
    """FCHK asks whether a float division needs the slow way: numbers of usual size never do."""
    return any(f"!{one.operands[0]}" == block.instructions[-1].guard for one in block.instructions if one.opcode == "FCHK")


def is_conditional(branch: Sass) -> bool:
    return branch.guard is not None or any(re.match(r"[!~]?U?(P|R)(\d|T|Z)", one) for one in branch.operands[:1])


def _section(disassembly: str, kernel: str | None) -> str:
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", disassembly, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    if kernel is None and len(found) == 1:
        return next(iter(found.values()))
    if kernel not in found:
        raise ValueError(f"kernel: {kernel!r} is not among {', '.join(sorted(found))}")
    return found[kernel]


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?((?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?))\s*;")


def _instructions(section: str) -> tuple[list[Sass], dict[str, int]]:
    found: list[Sass] = []
    labels: dict[str, int] = {}
    fresh: list[str] = []
    for line in section.splitlines():
        if label := re.match(r"\s*([.$][\w.$]+):", line):
            fresh.append(label[1])
        elif line.lstrip().startswith("//-"):
            break
        elif one := _LINE.match(line.strip()):
            address, text, guard, name, operands = one.groups()
            text = text.replace(".reuse", "")
            parts = tuple(_split(operands.replace(".reuse", "")))
            found.append(Sass(int(address, 16), guard, name, parts, text))
            labels |= dict.fromkeys(fresh, int(address, 16))
            fresh = []
    return found, labels


def _split(operands: str) -> list[str]:
    return [one.strip() for one in re.split(r",(?![^\[]*\])", operands)] if operands else []


# ---- which operands are written -------------------------------------------------------------------------------------

_NO_TARGETS = (
    "ST", "STG", "STS", "STL", "STSM", "STTM", "BAR", "BRA", "BRX", "EXIT", "RED", "REDG", "REDAS", "NOP", "DEPBAR",
    "LDGDEPBAR", "MEMBAR", "FENCE", "LDGSTS", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "ENDCOLLECTIVE",
    "CCTL", "CCTLL", "ERRBAR", "YIELD", "NANOSLEEP", "KILL", "WARPGROUP", "ARRIVES", "UTMALDG", "UTMASTG", "UCGABAR_WAIT",
    "UCGABAR_ARV", "ACQBULK", "PREEXIT", "BPT", "UTMACMDFLUSH", "UBLKCP", "UTCBAR", "UTCHMMA", "UTCATOMSWS", "LDTM",
)  # fmt: skip
_TWO_PREDICATES = ("ISETP", "FSETP", "HSETP2", "DSETP", "PLOP3", "FCHK", "PSETP")


def _is_register(operand: str) -> bool:
    return re.fullmatch(r"U?[RP](\d+|R)", operand) is not None and operand not in ("RR", "URR")


def _is_place(operand: str) -> bool:
    return re.fullmatch(r"U?(R|P)(\d+|Z|T)", operand) is not None


@functools.cache
def plain(opcode: str) -> str:
    """The opcode of which a uniform one is the counterpart."""
    return opcode[1:] if opcode.startswith("U") and not opcode.startswith(("UT", "UC", "UB")) else opcode


def _target_count(one: Sass) -> int:
    """How many of the first operands are written."""
    opcode = plain(one.opcode)
    if opcode in _NO_TARGETS or opcode == "SYNCS" and "ARRIVE" in one.name:
        return 0
    if opcode in _TWO_PREDICATES:
        return 1 if opcode == "FCHK" else 2
    if opcode == "R2P":
        return 1
    # Predicates before a register, the register, and what it carries out.
    count = 0
    while count < len(one.operands) - 1 and _is_place(one.operands[count]) and "P" in one.operands[count]:
        count += 1
    if opcode.startswith("VOTE"):
        return 2 if count == 0 else 1
    count += 1
    carries = opcode in ("IADD3", "LEA", "IMAD", "VIMNMX", "VIMNMX3", "LDG", "LD", "IADD", "R2UR")
    while carries and count < len(one.operands) - 2 and re.fullmatch(r"U?P(\d|T)", one.operands[count]):
        count += 1
    return count


def _width(one: Sass, operand: str) -> int:
    """Registers of a target."""
    if "P" in operand:
        return 1
    opcode, suffixes = plain(one.opcode), one.suffixes
    if opcode in ("HMMA", "IMMA", "QMMA", "OMMA", "BMMA"):
        return 4
    if opcode == "DMMA":
        return 8
    if opcode in ("HGMMA", "IGMMA", "QGMMA"):
        n = re.search(r"\.\d+x(\d+)x", one.name)
        return min(255 - int(operand[1:]), int(n[1]) // 2) if n else 1
    if opcode == "LDSM":
        return int((re.search(r"\.(\d)$", one.name) or "11")[1])
    if "128" in suffixes:
        return 4
    wide = "64" in suffixes or "WIDE" in suffixes or opcode.startswith("D") and opcode not in ("DEPBAR", "DSETP")
    wide = wide or "S64" in suffixes or "U64" in suffixes and opcode != "SHF" or opcode in ("FFMA2", "FADD2", "FMUL2")
    if opcode in ("CS2R", "CS2UR"):
        return 1 if "32" in suffixes else 2
    if opcode == "I2F":
        return 2 if "F64" in suffixes else 1
    return 2 if wide else 1


def _source_width(one: Sass, source: str) -> int:
    """Registers of a source: pairs are read by addresses of device memory and 64-bit arithmetic."""
    if "desc[" in source or ".64" in source:
        return 2
    opcode, suffixes = plain(one.opcode), set(one.suffixes)
    if opcode == "HMMA":
        # Fragments of A, B and of the sums.
        return (4, 2, 4)[one.sources.index(source)] if "16816" in suffixes else (2, 1, 4)[one.sources.index(source)]
    if opcode.startswith("ST") and "[" not in source and "128" in suffixes:
        return 4
    if suffixes & {"64", "S64", "U64"} and "[" not in source or opcode in ("FFMA2", "FADD2", "FMUL2"):
        return 2
    if opcode == "IMAD" and suffixes & {"WIDE", "HI"} and source == one.sources[2]:
        return 2
    return 1

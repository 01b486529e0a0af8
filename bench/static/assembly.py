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

    @functools.cached_property
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
        return _predicates_at_once(self, "R2P", "UR2UP") + sum(bits(operand, width) for operand, width in self.targets)

    @functools.cached_property
    def reads(self) -> int:
        """Registers of its sources, two of each where a pair may be meant; without the guard."""
        found = _predicates_at_once(self, "P2R", "UP2UR")
        for source in self.sources:
            found |= bits(source, _source_width(self, source))
        return found

    @functools.cached_property
    def guards(self) -> int:
        return bits(self.guard, 1) if self.guard else 0

    @functools.cached_property
    def label(self) -> str | None:
        """Where a branch leads to: a label, or an address as 0x10."""
        found = re.search(r"`\(([^)]+)\)|\b(0x[0-9a-f]+)$", " ".join(self.operands[-1:]))
        return (found[1] or found[2]) if found else None

    @property
    def table(self) -> list[str]:
        """Labels of a jump table."""
        found = re.search(r"BRANCH_TARGETS ([^\"]*)", self.text)
        return found[1].strip().split(",") if found else []


@dataclass
class Block:
    """Instructions that run one after another. ``next``: blocks that may follow."""

    instructions: list[Sass] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """``blocks`` in the order of the text; ``at``: the block at an address, where one begins; labels as addresses.

    ``traps``: blocks that end in a trap, which no run enters: checks of tensor memory on Blackwell. ``calls``: what
    a subroutine writes, by the block that calls it and goes on behind it.
    """

    blocks: Sequence[Block]
    at: dict[int, int]
    labels: dict[str, int]
    traps: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)

    def is_followed(self, branch: Sass) -> bool:
        """Whether a branch is more than a check that traps."""
        return branch.opcode != "BRA" or self.target(branch) not in self.traps

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


@functools.lru_cache(1 << 16)
def bits(operand: str, width: int) -> int:
    """The set of the registers that an operand names, and of those behind them up to ``width``."""
    found = 0
    for kind, number in _REGISTER.findall(operand):
        first = FIRST[kind] + int(number)
        found |= ((1 << (1 if kind.endswith("P") else width)) - 1) << first
    return found


def code_of(disassembly: str, kernel: str | None = None) -> Code:
    """The machine code of ``kernel``, or of the only one.

    Raises:
        ValueError: there is no such kernel.
    """
    instructions, labels = _instructions(section(disassembly, kernel))
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
    for number, block in enumerate(blocks):
        block.next = [one for one in _following(code, number) if one < len(blocks)]
    _return(code)
    code.traps.update(n for n, block in enumerate(blocks) if any(one.opcode == "BPT" for one in block.instructions))
    code.traps.update(n for n, block in enumerate(blocks) if block.next and set(block.next) <= code.traps)
    for block in blocks:
        block.next = [one for one in block.next if one not in code.traps]
    return code


def _return(code: Code) -> None:
    """Lead each RET to what follows the calls that come to it."""
    ends: dict[int, set[int]] = {}
    for number, block in enumerate(code.blocks):
        if block.instructions[-1].opcode == "CALL" and number + 1 < len(code.blocks):
            inside = _subroutine(code, code.target(block.instructions[-1]))
            own = [one for one in inside if code.blocks[one].instructions[-1].opcode == "RET"]
            for end in own:
                ends.setdefault(end, set()).add(number + 1)
            if own:
                code.calls[number] = _written(code, inside)
    for end, following in ends.items():
        code.blocks[end].next += sorted(following)


def _subroutine(code: Code, entry: int) -> set[int]:
    """The blocks of a subroutine; those that it calls are taken to come back."""
    seen, todo = {entry}, [entry]
    while todo:
        block = todo.pop()
        calls = code.blocks[block].instructions[-1].opcode == "CALL"
        following = [block + 1] if calls else code.blocks[block].next
        fresh = [one for one in following if one not in seen and one < len(code.blocks)]
        seen.update(fresh)
        todo += fresh
    return seen


def _written(code: Code, blocks: set[int]) -> int:
    """Registers that blocks write, and whatever they call."""
    found = 0
    for number in blocks:
        for one in code.blocks[number].instructions:
            found |= -1 if one.opcode == "CALL" else one.writes
    return found


def _following(code: Code, number: int) -> list[int]:
    last = code.blocks[number].instructions[-1]
    falls = [number + 1]
    if last.opcode == "BRA" and _skips_the_slow_division(code.blocks[number]):
        return [code.target(last)]
    if last.opcode in ("BRA", "CALL"):
        return [code.target(last), *(falls if is_conditional(last) else [])]
    if last.opcode == "BRX":
        return [code.at[code.labels[label]] for label in last.table]
    if last.opcode == "RET":
        return falls if last.guard else []
    if last.opcode == "EXIT":
        return falls if is_conditional(last) else []
    return falls


def _skips_the_slow_division(block: Block) -> bool:
    """FCHK asks whether a float division needs the slow way: numbers of usual size never do."""
    guard = block.instructions[-1].guard
    return any(one.opcode == "FCHK" and f"!{one.operands[0]}" == guard for one in block.instructions)


def is_conditional(branch: Sass) -> bool:
    return branch.guard is not None or any(re.match(r"[!~]?U?(P|R)(\d|T|Z)", one) for one in branch.operands[:1])


def section(disassembly: str, kernel: str | None) -> str:
    """The text of ``kernel``, or of the only one.

    Raises:
        ValueError: there is no such kernel.
    """
    found = _sections(disassembly)
    if kernel is None and len(found) == 1:
        return next(iter(found.values()))
    if kernel not in found:
        raise ValueError(f"kernel: {kernel!r} is not among {', '.join(sorted(found))}")
    return found[kernel]


@functools.lru_cache(16)
def _sections(disassembly: str) -> dict[str, str]:
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", disassembly, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


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
            parts = tuple(_split(re.sub(r"\(\*.*\*\)", "", operands.replace(".reuse", ""))))
            found.append(Sass(int(address, 16), guard, name, parts, text))
            labels |= dict.fromkeys(fresh, int(address, 16))
            fresh = []
    return found, labels


def _split(operands: str) -> list[str]:
    return [one.strip() for one in re.split(r",(?![^\[]*\])", operands)] if operands else []


def _predicates_at_once(one: Sass, *opcodes: str) -> int:
    """The predicates that one of ``opcodes`` names by a mask: P2R and R2P, or UP2UR and UR2UP of uniform ones."""
    kind = "UP" if one.opcode.startswith("U") else "P"
    return int(one.operands[-1], 16) << FIRST[kind] if one.opcode in opcodes else 0


# ---- which operands are written -------------------------------------------------------------------------------------

_NO_TARGETS = (
    "ST", "STG", "STS", "STL", "STSM", "STTM", "BAR", "BRA", "BRX", "EXIT", "RED", "REDG", "REDAS", "NOP", "DEPBAR",
    "LDGDEPBAR", "MEMBAR", "FENCE", "LDGSTS", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "ENDCOLLECTIVE",
    "CCTL", "CCTLL", "ERRBAR", "YIELD", "NANOSLEEP", "KILL", "WARPGROUP", "ARRIVES", "UTMALDG", "UTMASTG",
    "UCGABAR_WAIT", "UCGABAR_ARV", "ACQBULK", "PREEXIT", "BPT", "UTMACMDFLUSH", "UBLKCP", "UTCBAR", "UTCHMMA",
)  # fmt: skip
_TWO_PREDICATES = ("ISETP", "FSETP", "HSETP2", "DSETP", "PLOP3", "FCHK", "PSETP")


@functools.lru_cache(1 << 16)
def _is_register(operand: str) -> bool:
    return re.fullmatch(r"U?[RP]\d+", operand) is not None


@functools.lru_cache(1 << 16)
def _is_place(operand: str) -> bool:
    return re.fullmatch(r"U?(R|P)(\d+|Z|T)", operand) is not None


@functools.cache
def plain(opcode: str) -> str:
    """The opcode of which a uniform one is the counterpart."""
    return opcode[1:] if opcode.startswith("U") and not opcode.startswith(("UT", "UC", "UB")) else opcode


def _target_count(one: Sass) -> int:
    """How many of the first operands are written."""
    opcode = plain(one.opcode)
    if opcode in _NO_TARGETS or ("SYNCS" in one.name and "TRYWAIT" not in one.name):
        return 0
    if opcode == "UTCATOMSWS":
        return 2 if "FIND_AND_SET" in one.name else 0
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
    wide = "64" in suffixes or "WIDE" in suffixes or opcode in ("FFMA2", "FADD2", "FMUL2", "DADD", "DMUL", "DFMA")
    # A funnel shift names both halves of what it shifts, and gives one of the result.
    wide = wide or (opcode != "SHF" and bool({"S64", "U64"} & set(suffixes)))
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
    if opcode not in ("SHF", "F2I") and suffixes & {"64", "S64", "U64"} and "[" not in source:
        return 2
    if opcode in ("FFMA2", "FADD2", "FMUL2", "DADD", "DMUL", "DFMA"):
        return 2
    if opcode == "IMAD" and suffixes & {"WIDE", "HI"} and source == one.sources[2]:
        return 2
    return 1

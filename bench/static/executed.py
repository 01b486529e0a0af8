"""How often a thread executes each part of a kernel's PTX, run on the launch's numbers: a check of warp.py.

Which way a kernel branches depends on its numbers, on the program and on the thread, never on what tensors hold. So
only the instructions that lead to a branch are run. `Ptx` cuts the text into blocks; `Ptx.counts` runs one thread and
counts how often it enters each; `operations` counts instructions by name. The tests hold machine code to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_STEPS = 20_000_000
PARAMETER_BITS = 32  # of an address within a parameter; above them is its number
_SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid")


@dataclass
class Instruction:
    """``predicate`` (register, wanted value) or None; ``name`` with its suffixes; registers and constants."""

    name: str
    predicate: tuple[str, bool] | None
    targets: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass
class Block:
    """Instructions without a branch but at the end. ``label``: its name, if a branch leads here."""

    label: str | None
    instructions: list[Instruction] = field(default_factory=list)


class Ptx:
    """A kernel's PTX. ``parameters``: (name, bits) in order."""

    def __init__(self, text: str, kernel: str | None = None) -> None:
        head, body = _entry(text, kernel)
        found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)[^\n]*?(\w+)(?:\[\d+\])?\s*[,\n)]", head)
        self.parameters = [(name, int(bits)) for bits, name in found]
        self.blocks = _blocks(body)
        self._index = {block.label: number for number, block in enumerate(self.blocks) if block.label}
        self._places = {name: (index + 1) << PARAMETER_BITS for index, (name, _) in enumerate(self.parameters)}
        self._names = {place: name for name, place in self._places.items()}
        self._steps = [self._compile(block) for block in self.blocks]

    def graph(self) -> list[list[int]]:
        """The blocks that may follow each block."""
        found = []
        for number, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else None
            to = [self._index[last.sources[0]]] if last and last.name.startswith("bra") else []
            falls_through = last is None or not _branches(last) or last.predicate is not None
            found.append([*to, *([number + 1] if falls_through and number + 1 < len(self.blocks) else [])])
        return found

    def counts(
        self, arguments: Mapping[str, int], program: tuple[int, ...], grid: tuple[int, ...], thread: int, threads: int
    ) -> list[int]:
        """Entries of each block by one ``thread`` of a ``program``. ``arguments`` by parameter name.

        Raises:
            ValueError: a branch depends on what is read from memory, or the kernel does not end.
        """
        registers: dict[str, int] = {f"{name}.{axis}": 0 for name in _SPECIAL for axis in "xyz"}
        registers |= {f"%ctaid.{axis}": value for axis, value in zip("xyz", program, strict=False)}
        registers |= {f"%nctaid.{axis}": value for axis, value in zip("xyz", (*grid, 1, 1), strict=False)}
        registers |= {"%tid.x": thread, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, **arguments}
        entered = [0] * len(self.blocks)
        at, left = 0, MAX_STEPS
        while at is not None and at < len(self.blocks):
            entered[at] += 1
            left -= 1
            if left < 0:
                raise ValueError(f"the kernel has not ended after {MAX_STEPS} blocks: is an argument missing?")
            to: int | None = at + 1
            for step in self._steps[at]:
                found = step(registers)
                if found is not None:
                    to = None if found < 0 else found
                    break
            at = to
        return entered

    def _compile(self, block: Block) -> list[Callable[[dict[str, int]], int | None]]:
        needed = self._needed_registers()
        return [
            self._step(instruction)
            for instruction in block.instructions
            if _branches(instruction) or any(target in needed for target in instruction.targets)
        ]

    def _needed_registers(self) -> set[str]:
        """Those that some branch depends on, through any definition."""
        if not hasattr(self, "_needed"):
            defined: dict[str, list[Instruction]] = {}
            todo: list[str] = []
            for block in self.blocks:
                for instruction in block.instructions:
                    for target in instruction.targets:
                        defined.setdefault(target, []).append(instruction)
                    if _branches(instruction) and instruction.predicate:
                        todo.append(instruction.predicate[0])
            self._needed: set[str] = set()
            while todo:
                register = todo.pop()
                if register not in self._needed:
                    self._needed.add(register)
                    for instruction in defined.get(register, ()):
                        todo += [s for s in instruction.sources if s.startswith("%")]
                        if instruction.name.startswith("ld.param"):
                            todo += _registers(list(instruction.sources))
                        todo += [instruction.predicate[0]] if instruction.predicate else []
        return self._needed

    def _place(self, label: str) -> int:
        if label not in self._index:
            raise ValueError(
                f"a branch leads to {label}, which is no label outside inline assembly: cannot be counted"
            )
        return self._index[label]

    def _assignment(self, instruction: Instruction) -> Callable[[dict[str, int]], None]:
        """As `_assignment`; a parameter's address is a number, so that a struct may be indexed."""
        base, *suffixes = instruction.name.split(".")
        if base == "mov" and instruction.sources[0] in self._places:
            (target,), place = instruction.targets, self._places[instruction.sources[0]]
            return lambda registers: registers.update({target: place})
        if base == "ld" and "param" in suffixes and "%" in instruction.sources[0]:
            return self._load_at_address(instruction)
        return _assignment(instruction)

    def _load_at_address(self, instruction: Instruction) -> Callable[[dict[str, int]], None]:
        base, offset = re.match(r"\[\s*(%\w+)(?:\+(-?\d+))?\s*\]", instruction.sources[0]).groups()
        width, signed = _bits(instruction.name)

        def load(registers: dict[str, int]) -> None:
            address = registers[base] + int(offset or 0)
            name = self._names[address >> PARAMETER_BITS << PARAMETER_BITS]
            first = address & ((1 << PARAMETER_BITS) - 1)
            for index, target in enumerate(instruction.targets):
                value = registers.get(f"{name}+{first + index * width // 8}.{width}", 0)
                registers[target] = _wrap(value, width, signed)

        return load

    def _step(self, instruction: Instruction) -> Callable[[dict[str, int]], int | None]:
        if instruction.name.startswith("bra"):
            to = self._place(instruction.sources[0])
            act: Callable[[dict[str, int]], int | None] = lambda registers: to  # noqa: E731
        elif instruction.name in ("ret", "exit"):
            act = lambda registers: -1  # noqa: E731
        else:
            act = self._assignment(instruction)
        if instruction.predicate is None:
            return act
        register, wanted = instruction.predicate
        return lambda registers: act(registers) if bool(registers[register]) == wanted else None


def operations(
    ptx: Ptx, arguments: Mapping[str, int], program: tuple[int, ...], grid: tuple[int, ...], threads: int
) -> Counter[str]:
    """Instructions by name that the first threads of all warps execute."""
    found: Counter[str] = Counter()
    for warp in range(-(-threads // 32)):
        entered = ptx.counts(arguments, program, grid, 32 * warp, threads)
        for block, times in zip(ptx.blocks, entered, strict=True):
            for instruction in block.instructions:
                found[instruction.name] += times
    return found


def arguments_of(ptx: Ptx, values: Sequence[bytes]) -> dict[str, int]:
    """Every number of every parameter, by place and width, from their bytes."""
    return {
        f"{name}+{place}.{8 * size}": int.from_bytes(data[place : place + size], "little")
        for (name, _), data in zip(ptx.parameters, values, strict=True)
        for size in (1, 2, 4, 8)
        for place in range(0, len(data) - size + 1, size)
    }


def _branches(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("bra", "ret", "exit")


def _entry(text: str, kernel: str | None) -> tuple[str, str]:
    """The parameter list and the body of ``kernel``, or of the only one."""
    for found in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{", text):
        if kernel is None or found[1] == kernel:
            return found[2] + "\n", text[found.end() : _closing(text, found.end())]
    raise ValueError(f"the PTX has no kernel {kernel!r}")


def _closing(text: str, first: int) -> int:
    """Where the brace closes that opened before ``first``. Inline assembly has braces of its own."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[first:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return first + brace.start()
    raise ValueError("the PTX ends within a kernel")


def _blocks(body: str) -> list[Block]:
    body = re.sub(r"//[^\n]*", "", body)
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", body))
    blocks = [Block(None)]
    for part in re.split(r"[;\n]", body):
        text = part.strip()
        label = re.match(r"([$\w]+):$", text)
        if label and label[1] in targets:
            blocks.append(Block(label[1]))
        elif text and not label and text[0] not in "{}." and (instruction := _instruction(text)):
            blocks[-1].instructions.append(instruction)
            if _branches(instruction):
                blocks.append(Block(None))
    return blocks


def _instruction(text: str) -> Instruction | None:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if found is None:
        return None
    negated, register, name, rest = found.groups()
    predicate = (register, not negated) if register else None
    operands = [one.strip() for one in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
    if name.split(".")[0] in ("bra", "ret", "exit"):
        return Instruction(name, predicate, (), tuple(operands))
    targets, sources = operands[:1], operands[1:]
    if name.split(".")[0] in ("st", "bar", "red", "fence", "membar"):
        targets, sources = [], operands
    return Instruction(name, predicate, tuple(_registers(targets)), tuple(s.strip() for s in sources))


def _registers(operands: list[str]) -> list[str]:
    return [register for one in operands for register in re.findall(r"%\w+", one)]


# ---- what an instruction computes -----------------------------------------------------------------------------------


def _bits(name: str) -> tuple[int, bool]:
    """(width, signed) of the last type suffix."""
    kind, width = (re.findall(r"\.([bus])(\d+)", name) or [("b", "32")])[-1]
    return int(width), kind == "s"


def _wrap(value: int, width: int, signed: bool) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if signed and value >> (width - 1) else value


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip


def _quotient(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b, "min": min, "max": max, "div": _quotient, "rem": lambda a, b: a - b * _quotient(a, b),
    "shl": lambda a, b: a << b if b < 64 else 0, "shr": lambda a, b: a >> min(b, 64), "not": lambda a: ~a,
    "neg": lambda a: -a, "abs": abs, "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a,
    "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c, "selp": lambda a, b, p: a if p else b,
}  # fmt: skip


def _assignment(instruction: Instruction) -> Callable[[dict[str, int]], None]:
    base, *suffixes = instruction.name.split(".")
    width, signed = _bits(instruction.name)
    (target, *_), read = instruction.targets, [_reader(s) for s in instruction.sources]
    if base == "ld" and "param" in suffixes:
        return _load_of_parameter(instruction, width // 8)
    if base == "setp":
        return _comparison(target, suffixes[0], width, signed, read)
    if base == "bfe":
        return _assign(
            target, lambda a, first, count: _wrap(a >> first, count, signed) if count else 0, read, width, signed
        )
    if base == "shfl" and "idx" in suffixes and instruction.sources[1] == "0":
        # Every thread that is run is the first of its warp.
        base, read = "mov", read[:1]
    if base == "bfi":
        return _assign(target, _inserted, read, width, signed)
    compute = _ARITHMETIC.get(base)
    if compute is None:
        return _refusal(instruction)
    if "pred" in suffixes:
        width, signed = 1, False
    if base in ("mul", "mad") and "wide" in suffixes:
        return _assign(target, compute, read, 2 * width, signed, width, wide=True)
    if base == "mul" and "hi" in suffixes:
        return _assign(target, lambda a, b: (a * b) >> width, read, width, signed, width)
    if base == "cvt":
        kinds = re.findall(r"\.([usb])(\d+)", instruction.name)
        (to_kind, to_width), (from_kind, from_width) = kinds[-2], kinds[-1]
        inner = int(from_width), from_kind == "s"
        return _assign(target, lambda a: _wrap(a, *inner), read, int(to_width), to_kind == "s")
    return _assign(target, compute, read, width, signed, width)


def _inserted(bits: int, into: int, first: int, count: int) -> int:
    mask = ((1 << count) - 1) << first
    return into & ~mask | bits << first & mask


def _load_of_parameter(instruction: Instruction, size: int) -> Callable[[dict[str, int]], None]:
    """A field of a struct is named after its parameter: name+offset."""
    found = re.search(r"\[\s*([A-Za-z_][\w$]*)(?:\+(\d+))?\s*\]", instruction.sources[0])
    if found is None:
        return _refusal(instruction)
    name, first = found[1], int(found[2] or 0)
    places = [first + index * size for index in range(len(instruction.targets))]
    keys = [(f"{name}+{place}" if place else name, f"{name}+{place}.{8 * size}") for place in places]

    def load(registers: dict[str, int]) -> None:
        for target, (key, typed) in zip(instruction.targets, keys, strict=True):
            registers[target] = registers.get(typed, registers.get(key, 0))

    return load


def _refusal(instruction: Instruction) -> Callable[[dict[str, int]], None]:
    text = f"{instruction.name} {', '.join(instruction.sources)}"

    def refuse(registers: dict[str, int]) -> None:
        raise ValueError(f"a branch depends on `{text}`, which is not integer arithmetic on the launch's numbers")

    return refuse


def _comparison(
    target: str, relation: str, width: int, signed: bool, read: list[Callable[[dict[str, int]], int]]
) -> Callable[[dict[str, int]], None]:
    compare, (left, right) = _COMPARE[relation], read[:2]
    signed = signed and relation not in ("lo", "ls", "hi", "hs")

    def assign(registers: dict[str, int]) -> None:
        registers[target] = int(compare(_wrap(left(registers), width, signed), _wrap(right(registers), width, signed)))

    return assign


def _assign(
    target: str,
    compute: Callable[..., int],
    read: list[Callable[[dict[str, int]], int]],
    width: int,
    signed: bool,
    source_width: int = 64,
    wide: bool = False,
) -> Callable[[dict[str, int]], None]:
    def assign(registers: dict[str, int]) -> None:
        values = [one(registers) for one in read]
        if source_width < 64:
            # The addend of a wide multiply-add has the width of the result.
            widths = [source_width, source_width, width] if wide else [source_width] * len(values)
            values = [_wrap(value, *(one, signed)) for value, one in zip(values, widths, strict=False)]
        registers[target] = _wrap(compute(*values), width, signed)

    return assign


def _reader(source: str) -> Callable[[dict[str, int]], int]:
    if source.startswith("%"):
        return lambda registers: registers[source]
    if re.fullmatch(r"-?\d+U?", source):
        value = int(source.rstrip("U"))
        return lambda registers: value
    if re.fullmatch(r"0x[0-9a-fA-F]+U?", source):
        value = int(source.rstrip("U"), 16)
        return lambda registers: value
    return lambda registers: 0  # the address of a symbol

"""Which instructions of a kernel must be computed to know where control goes and which addresses are asked for.

Two passes over the blocks. Forward: registers that may hold something unknown, which is what memory holds and what
semantics.py does not compute; bit by bit where predicates are kept in a register. Backward: registers that a branch,
or the address of a request, still needs. An instruction belongs to the slice if it writes one of those.
"""

from __future__ import annotations

from dataclasses import dataclass

from assembly import FIRST, Code, Sass, bits
from semantics import CONSTANT, Assignments, computed

BRANCHES = ("BRA", "EXIT", "RET", "CALL", "BRX", "BREAK", "JMP", "JMX", "KILL")
_REQUESTS = ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED", "REDG", "LDGSTS")


# Whether one runs is counted thread by thread, since an idle one keeps no unit busy: products and barriers.
_UNITS = ("HMMA", "IMMA", "BAR")


@dataclass(frozen=True)
class Step:
    """An instruction of the slice: ``assignments`` of what it computes; ``known``: its needs are computed as well."""

    instruction: Sass
    number: int
    assignments: Assignments | None
    known: bool


def is_request(one: Sass) -> bool:
    """Whether it asks shared or device memory for something."""
    return one.opcode in _REQUESTS


def is_branch(one: Sass) -> bool:
    return one.opcode in BRANCHES


def is_guarded_unit(one: Sass) -> bool:
    """Whether a guard decides if a product or a barrier runs."""
    return one.opcode in _UNITS and one.guard is not None


def steps_of(code: Code) -> list[list[Step]]:
    """The slice of every block, in order."""
    facts = [[_Fact.of(one, code) for one in block.instructions] for block in code.blocks]
    seen = [_seen(its_facts, at) for its_facts, at in zip(facts, _forward(code, facts), strict=True)]
    needed = _backward(code, seen)
    first, found = 0, []
    for its_seen, after in zip(seen, needed, strict=True):
        found.append(_steps(its_seen, after, first))
        first += len(its_seen)
    return found


@dataclass(frozen=True)
class _Fact:
    one: Sass
    assignments: Assignments | None
    writes: int
    reads: int
    needs: int  # what must be known to follow it
    masked: tuple[int, int] | None

    @staticmethod
    def of(one: Sass, code: Code) -> _Fact:
        needs = 0
        if is_branch(one) and code.is_followed(one):
            needs = one.guards | sum(bits(source.split("`")[0], 1) for source in one.operands)
        elif is_request(one):
            needs = one.guards
            for source in one.operands:
                needs |= bits(source, 2 if ".64" in source else 1) if "[" in source else 0
        elif is_guarded_unit(one):
            needs = one.guards
        assignments = computed(one) if one.writes else None
        reads = 0 if one.opcode in CONSTANT else one.reads
        return _Fact(one, assignments, one.writes, reads | one.guards, needs, _masked(one))


_ALL = (1 << 32) - 1


def _masked(one: Sass) -> tuple[int, int] | None:
    """(register, its bits that decide the result) of an AND or an OR with a number: predicates are kept so."""
    if one.name != "LOP3.LUT" or one.sources[2] != "RZ" or not one.sources[1].startswith("0x"):
        return None
    if one.sources[3] not in ("0xc0", "0xfc") or not one.sources[0].startswith("R") or one.sources[0] == "RZ":
        return None
    mask = int(one.sources[1], 16)
    return int(one.sources[0][1:]), mask if one.sources[3] == "0xc0" else _ALL & ~mask


class _Unknown:
    """Registers that may hold something unknown, and which bits of them where not all do.

    ``known_if``: by guard, those that are known where the guard holds, though others wrote something unknown before.
    It is kept within a block.
    """

    def __init__(self, registers: int, partly: dict[int, int]) -> None:
        self.registers, self.partly = registers, dict(partly)
        self.known_if: dict[str, int] = {}

    def of(self, fact: _Fact) -> int:
        """As an instruction sees them."""
        return self.registers & ~self.known_if.get(fact.one.guard or "", 0)

    def bits_of_result(self, fact: _Fact) -> int:
        """That are unknown, of 32."""
        unknown = self.of(fact)
        if fact.assignments is None or fact.one.guards & unknown:
            return _ALL
        if fact.masked is None:
            return _ALL if fact.reads & unknown else 0
        register, mask = fact.masked
        return self.partly.get(register, _ALL) & mask if unknown >> register & 1 else 0

    def pass_(self, fact: _Fact) -> None:
        if not fact.writes:
            return
        guard, spoiled = fact.one.guard, self.bits_of_result(fact)
        register = fact.writes.bit_length() - 1
        if spoiled and fact.masked and fact.writes == 1 << register and register < FIRST["UR"]:
            before = self.partly.get(register, _ALL) if self.registers >> register & 1 and guard else 0
            self.partly[register] = spoiled | before
        else:
            self.partly = {one: mask for one, mask in self.partly.items() if not fact.writes >> one & 1}
        if spoiled:
            self.registers |= fact.writes
            opposite = _opposite(guard)
            self.known_if = {g: k if g == opposite else k & ~fact.writes for g, k in self.known_if.items()}
        elif guard is None:
            self.registers &= ~fact.writes
        else:
            self.known_if[guard] = self.known_if.get(guard, 0) | fact.writes
        self.known_if = {g: known for g, known in self.known_if.items() if not bits(g, 1) & fact.writes}

    def only(self, registers: int) -> _Unknown:
        """What is unknown of some registers."""
        partly = {register: mask for register, mask in self.partly.items() if registers >> register & 1}
        return _Unknown(self.registers & registers, partly)

    def join(self, other: _Unknown) -> None:
        """Become what is unknown on either way."""
        partly = {}
        for register in {*self.partly, *other.partly}:
            masks = [x.partly.get(register, _ALL) for x in (self, other) if x.registers >> register & 1]
            partly[register] = masks[0] | masks[-1] if masks else 0
        self.registers |= other.registers
        self.partly = {register: mask for register, mask in partly.items() if mask not in (0, _ALL)}


def _opposite(guard: str | None) -> str | None:
    return guard and (guard[1:] if guard.startswith("!") else f"!{guard}")


@dataclass(frozen=True)
class _Seen:
    """An instruction, whether its result is known (some bits at least), and whether its needs are."""

    fact: _Fact
    computes: bool
    known: bool

    def before(self, needed: int) -> int:
        """Needed registers before the instruction."""
        fact = self.fact
        if fact.writes & needed:
            if not fact.one.guard:
                needed &= ~fact.writes
            needed |= fact.reads if self.computes else 0
        return needed | (fact.needs if self.known else 0)


def _seen(facts: list[_Fact], at: _Unknown) -> list[_Seen]:
    found, unknown = [], _Unknown(at.registers, at.partly)
    for fact in facts:
        computes = bool(fact.writes) and unknown.bits_of_result(fact) != _ALL
        found.append(_Seen(fact, computes, not fact.needs & unknown.of(fact)))
        unknown.pass_(fact)
    return found


def _forward(code: Code, facts: list[list[_Fact]]) -> list[_Unknown]:
    """What is unknown at the start of each block."""
    found: list[_Unknown | None] = [None] * len(facts)
    todo = [(0, _Unknown(0, {}))]
    while todo:
        block, entering = todo.pop()
        here = found[block]
        if here is None:
            here = found[block] = _Unknown(entering.registers, entering.partly)
        else:
            before = here.registers, here.partly
            here.join(entering)
            if before == (here.registers, here.partly):
                continue
        behind = _Unknown(here.registers, here.partly)
        for fact in facts[block]:
            behind.pass_(fact)
        if code.blocks[block].instructions[-1].opcode == "RET":
            # What a subroutine leaves alone comes from where it was called, and not from all other places.
            todo += [(one, behind.only(code.calls.get(one - 1, -1))) for one in code.blocks[block].next]
        else:
            todo += [(one, behind) for one in code.blocks[block].next]
        if block in code.calls:
            todo.append((block + 1, behind.only(~code.calls[block])))
    return [one or _Unknown(0, {}) for one in found]


def _backward(code: Code, seen: list[list[_Seen]]) -> list[int]:
    """Needed registers at the end of each block."""
    above: list[list[int]] = [[] for _ in seen]
    for number, block in enumerate(code.blocks):
        for following in block.next:
            above[following].append(number)
    after, todo = [0] * len(seen), set(range(len(seen)))
    while todo:
        block = max(todo)
        todo.discard(block)
        needed = after[block]
        for one in reversed(seen[block]):
            needed = one.before(needed)
        for previous in above[block]:
            if needed & ~after[previous]:
                after[previous] |= needed
                todo.add(previous)
    return after


def _steps(seen: list[_Seen], needed: int, first: int) -> list[Step]:
    found = []
    for number in reversed(range(len(seen))):
        one, fact = seen[number], seen[number].fact
        inside = one.computes and bool(fact.writes & needed)
        if inside or is_request(fact.one) or is_guarded_unit(fact.one) or is_branch(fact.one):
            found.append(Step(fact.one, first + number, fact.assignments if inside else None, one.known))
        needed = one.before(needed)
    return found[::-1]

"""Which instructions of a kernel must be computed to know where control goes and which addresses are asked for.

Two passes over the blocks. Forward: registers that may hold something unknown, which is what memory holds and what
semantics.py does not compute. Backward: registers that a branch, or the address of a request, still needs. An
instruction belongs to the slice if it writes one of those.
"""

from __future__ import annotations

from dataclasses import dataclass

from sass import Code, Sass, bits
from semantics import CONSTANT, Assignments, computed

BRANCHES = ("BRA", "EXIT", "RET", "CALL", "BRX", "BREAK", "JMP", "JMX", "KILL")
_REQUESTS = ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED", "REDG", "LDGSTS")


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


def steps_of(code: Code) -> list[list[Step]]:
    """The slice of every block, in order."""
    facts = [[_Fact.of(one) for one in block.instructions] for block in code.blocks]
    unknown = _forward(code, facts)
    needed = _backward(code, facts, unknown)
    first, found = 0, []
    for block, its_facts, at, after in zip(code.blocks, facts, unknown, needed, strict=True):
        found.append(_steps(its_facts, _unknown_before(its_facts, at), after, first))
        first += len(block.instructions)
    return found


@dataclass(frozen=True)
class _Fact:
    one: Sass
    assignments: Assignments | None
    writes: int
    reads: int
    needs: int  # what must be known to follow it

    @staticmethod
    def of(one: Sass) -> _Fact:
        needs = 0
        if one.opcode in BRANCHES:
            needs = one.guards | sum(bits(source.split("`")[0], 1) for source in one.operands)
        elif is_request(one):
            needs = one.guards
            for source in one.operands:
                needs |= bits(source, 2 if ".64" in source else 1) if "[" in source else 0
        assignments = computed(one) if one.writes else None
        reads = 0 if one.opcode in CONSTANT else one.reads
        return _Fact(one, assignments, one.writes, reads | one.guards, needs)

    def before(self, needed: int, unknown: int) -> int:
        """Needed registers before the instruction."""
        if self.writes & needed:
            inside = self.assignments is not None and not self.reads & unknown
            if not self.one.guard:
                needed &= ~self.writes
            needed |= self.reads if inside else 0
        return needed | (0 if self.needs & unknown else self.needs)


class _Unknown:
    """Registers that may hold something unknown, while one goes through a block.

    ``_known_if``: by guard, those that are known where the guard holds, though others wrote something unknown before.
    """

    def __init__(self, registers: int) -> None:
        self.registers = registers
        self._known_if: dict[str, int] = {}

    def of(self, fact: _Fact) -> int:
        """As an instruction sees them."""
        return self.registers & ~self._known_if.get(fact.one.guard or "", 0)

    def pass_(self, fact: _Fact) -> None:
        if not fact.writes:
            return
        guard, spoiled = fact.one.guard, fact.assignments is None or bool(fact.reads & self.of(fact))
        if spoiled:
            self.registers |= fact.writes
            opposite = _opposite(guard)
            self._known_if = {g: k if g == opposite else k & ~fact.writes for g, k in self._known_if.items()}
        elif guard is None:
            self.registers &= ~fact.writes
        else:
            self._known_if[guard] = self._known_if.get(guard, 0) | fact.writes
        self._known_if = {g: known for g, known in self._known_if.items() if not bits(g, 1) & fact.writes}


def _opposite(guard: str | None) -> str | None:
    return guard and (guard[1:] if guard.startswith("!") else f"!{guard}")


def _unknown_before(facts: list[_Fact], registers: int) -> list[int]:
    found, unknown = [], _Unknown(registers)
    for fact in facts:
        found.append(unknown.of(fact))
        unknown.pass_(fact)
    return found


def _unknown_behind(facts: list[_Fact], registers: int) -> int:
    unknown = _Unknown(registers)
    for fact in facts:
        unknown.pass_(fact)
    return unknown.registers


def _forward(code: Code, facts: list[list[_Fact]]) -> list[int]:
    """Unknown registers at the start of each block."""
    found = [-1] * len(facts)
    todo = [(0, 0)]
    while todo:
        block, unknown = todo.pop()
        joined = unknown if found[block] < 0 else found[block] | unknown
        if joined == found[block]:
            continue
        found[block] = joined
        behind = _unknown_behind(facts[block], joined)
        todo += [(following, behind) for following in code.blocks[block].next]
    return [max(one, 0) for one in found]


def _backward(code: Code, facts: list[list[_Fact]], unknown: list[int]) -> list[int]:
    """Needed registers at the end of each block."""
    above: list[list[int]] = [[] for _ in facts]
    for number, block in enumerate(code.blocks):
        for following in block.next:
            above[following].append(number)
    befores = [_unknown_before(its_facts, at) for its_facts, at in zip(facts, unknown, strict=True)]
    after, todo = [0] * len(facts), set(range(len(facts)))
    while todo:
        block = max(todo)
        todo.discard(block)
        needed = after[block]
        for fact, at in zip(reversed(facts[block]), reversed(befores[block]), strict=True):
            needed = fact.before(needed, at)
        for previous in above[block]:
            if needed & ~after[previous]:
                after[previous] |= needed
                todo.add(previous)
    return after


def _steps(facts: list[_Fact], unknown: list[int], needed: int, first: int) -> list[Step]:
    found = []
    for number in reversed(range(len(facts))):
        fact, at = facts[number], unknown[number]
        inside = fact.writes & needed and fact.assignments is not None and not fact.reads & at
        known = not fact.needs & at
        if inside or is_request(fact.one) or fact.one.opcode in BRANCHES:
            found.append(Step(fact.one, first + number, fact.assignments if inside else None, known))
        needed = fact.before(needed, at)
    return found[::-1]

"""Runs the machine code of a kernel for all threads of some programs, as far as branches and addresses go.

Programs run side by side, in lanes of their own, and none feels the others: numpy takes little longer for four than
for one. Threads that stand at the same block run it together, as numpy arrays; the block that comes first in the text
goes first. Within a warp they part where they branch differently and wait for each other as the code says (BSSY,
BSYNC, BREAK), so a block counts once for a warp each time that any of its threads enters it. Only the slice of
slices.py is computed; a branch that depends on anything else is refused. memory_requests.py says what a request
costs, from the addresses of its warp; where these depend on memory, it is taken to have no conflicts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from assembly import Code, Sass
from lanes import NAMES
from memory_requests import WARP
from request_counts import RequestCounts
from semantics import predicate, value
from slices import Step, is_branch, is_guarded_unit, is_request, steps_of

MAX_BLOCKS = 5_000_000
# Where parameters begin in constant bank 0, and where the sizes of a block and of the grid stand.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
SIZES = {80: (0x0, 0xC), 86: (0x0, 0xC), 89: (0x0, 0xC), 90: (0x0, 0xC), 100: (0x360, 0x370), 120: (0x360, 0x370)}
_COUNTS = {"R": 256, "U": 256, "P": 7, "Q": 7}


@dataclass(frozen=True)
class Launch:
    """``parameters``: their bytes, in order; ``grid``: programs; ``threads`` of a program."""

    parameters: bytes
    grid: tuple[int, int, int]
    threads: int


@dataclass(frozen=True)
class Run:
    """Of one program. ``entered``: by block, all warps together; ``blocks`` and ``took_part``: those that ran, in the
    order of time, and by warp whether it was there.

    ``requests``, ``wavefronts``, ``sectors``: by instruction, all warps together. ``asked``: numbers of the different
    sectors of device memory. ``passed``: by instruction, warps in which a product's or a barrier's guard holds.
    """

    entered: np.ndarray
    blocks: np.ndarray
    took_part: np.ndarray
    requests: np.ndarray
    wavefronts: np.ndarray
    sectors: np.ndarray
    passed: np.ndarray
    asked: np.ndarray


class Machine:
    """A kernel's code for ``arch``, ready to run. ``constants``: what lies in constant bank 2."""

    def __init__(self, code: Code, arch: int, constants: bytes = b"") -> None:
        if arch not in PARAMETERS:
            raise ValueError(f"arch: where sm_{arch} keeps parameters is not known; {', '.join(map(str, PARAMETERS))}")
        self.code, self.arch = code, arch
        self.constants = np.frombuffer(constants[: len(constants) // 4 * 4] or bytes(4), np.uint32)
        self.instructions = [one for block in code.blocks for one in block.instructions]
        self._steps = steps_of(code)
        # Numbers of the requests whose addresses are computed, and of the products and barriers whose guards are.
        known = [step for steps in self._steps for step in steps if step.known]
        self.followed = {step.number for step in known if is_request(step.instruction)}
        self.guarded = {step.number for step in known if is_guarded_unit(step.instruction)}
        self._texts: dict[tuple[int, bool], object] = {}

    def run(self, programs: Sequence[tuple[Launch, Sequence[int]]]) -> list[Run]:
        """Run programs to their end: (launch, the program's place in its grid). All have as many threads.

        Raises:
            ValueError: a branch depends on what memory holds or on what is not computed; the message names it.
        """
        return _Programs(self, programs).run()

    def body(self, block: int, whole: bool) -> object:
        """The slice of a block, compiled; ``whole``: for when all threads run it."""
        if (block, whole) not in self._texts:
            text = _function(self._steps[block], whole)
            self._texts[block, whole] = compile(text, f"block {block}", "exec")
        return self._texts[block, whole]

    def refused(self, block: int) -> Sass | None:
        """The branch at the end of a block, if it depends on what is not known."""
        last = self._steps[block][-1] if self._steps[block] else None
        return last.instruction if last and not last.known and is_branch(last.instruction) else None


# ---- the slice as text ----------------------------------------------------------------------------------------------


def _function(steps: Sequence[Step], whole: bool) -> str:
    """``def body(m, w)``: m are the active threads, w all of their warps. It returns the condition of the branch."""
    lines = ["def body(m, w):"]
    condition = "None"
    for step in steps:
        lines += _lines(step, whole)
        if is_branch(step.instruction) and step.known:
            condition = _condition(step.instruction)
    return "\n    ".join([*lines, f"return {condition}"])


def _lines(step: Step, whole: bool) -> list[str]:
    one = step.instruction
    if is_request(one):
        return _ask(step, whole) if step.known else []
    if is_guarded_unit(one):
        return [f"passing({step.number}, m & {predicate(one.guard)})"] if step.known else []
    if step.assignments is None:
        return []
    guard = predicate(one.guard) if one.guard else ""
    found = [f"t{i} = {text}" for i, (_, text) in enumerate(step.assignments)]
    for i, (place, _) in enumerate(step.assignments):
        active = "" if whole else "w" if place[0] in "UQ" else "m"
        mask = " & ".join(filter(None, (active, guard)))
        found.append(f"{place} = where({mask}, t{i}, {place})" if mask else f"{place} = t{i}")
    return found


def _ask(step: Step, whole: bool) -> list[str]:
    one = step.instruction
    mask = f"m & {predicate(one.guard)}" if one.guard else "m"
    return [f"ask({step.number}, {_address(operand)}, {mask})" for operand in one.operands if "[" in operand]


def _address(operand: str) -> str:
    """64 bits for device memory, 32 for shared memory."""
    inside = operand.split("[")[-1].rstrip("]")
    device = ".64" in inside
    terms = []
    for term in inside.replace("+-", "+~").split("+"):
        if term.startswith("~"):
            terms.append(f"n64({-int(term[1:], 16) & (1 << 64) - 1})" if device else value("-" + term[1:]))
        elif term.startswith("0x"):
            terms.append(f"n64({int(term, 16)})" if device else value(term))
        elif device:
            register = term.split(".")[0]
            whole = ".64" in term or register.startswith("UR")
            terms.append(f"join({value(register)}, {value(register, 1)})" if whole else f"up({value(register)})")
        else:
            register, _, scale = term.partition(".X")
            terms.append(f"{value(register)} * n({int(scale)})" if scale else value(register))
    return " + ".join(terms)


def _condition(one: Sass) -> str:
    """Which threads a branch concerns, as an expression; None for all."""
    guard = predicate(one.guard) if one.guard else ""
    first = one.operands[0] if one.operands else ""
    if one.opcode == "RET":
        return value(first.split("`")[0].split()[0])
    if one.opcode == "BRX":
        register, offset = first.split()
        return f"{value(register)} + n({(int(offset, 16) + one.address + 16) & 0xFFFFFFFF})"
    if one.opcode == "BRA" and one.suffixes[1:] in (("DIV",), ("CONV",)):
        relation = "!=" if one.suffixes[1] == "DIV" else "=="
        return f"ballot(true, m) {relation} {value(first)}"
    own = predicate(first) if first.lstrip("!U").startswith("P") else ""
    return " & ".join(filter(None, (guard, own))) or "None"


# ---- programs, side by side -----------------------------------------------------------------------------------------


class _Programs:
    def __init__(self, machine: Machine, programs: Sequence[tuple[Launch, Sequence[int]]]) -> None:
        self.machine, self.code = machine, machine.code
        (launch, _), *_ = programs
        self.count, self.warps = len(programs), -(-launch.threads // WARP)
        self.threads = np.tile(np.arange(self.warps * WARP), self.count)
        self.live = self.threads < launch.threads
        self.live_count = self.count * launch.threads
        self.trace: list[tuple[int, np.ndarray]] = []
        self.counts = RequestCounts(machine.instructions, self.count, len(self.threads))
        self.passed = np.zeros((len(machine.instructions), self.count), np.int64)
        self._groups: dict[int, np.ndarray] = {}
        self._heap: list[int] = []
        # By the number of a convergence barrier: who takes part; by it and the block behind it: who waits.
        self._parties: dict[str, np.ndarray] = {}
        self._waiting: dict[tuple[str, int], np.ndarray] = {}
        self._names = self._namespace(programs)
        self._bodies: dict[tuple[int, bool], Callable] = {}

    def run(self) -> list[Run]:
        self._go(0, self.live)
        for _ in range(MAX_BLOCKS):
            if not self._heap:
                if self._waiting:
                    raise ValueError(f"threads wait for each other for ever, at {sorted(self._waiting)}")
                return self._results()
            block = heapq.heappop(self._heap)
            self._step(block, self._groups.pop(block))
        raise ValueError(f"the kernel has not ended after {MAX_BLOCKS} blocks: is a parameter missing?")

    def _results(self) -> list[Run]:
        blocks = np.array([block for block, _ in self.trace])
        took_part = np.array([warps for _, warps in self.trace]).reshape(len(blocks), self.count, self.warps)
        asked = self.counts.different_sectors()
        found = []
        for one in range(self.count):
            here = took_part[:, one].any(1)
            mine, warps = blocks[here], took_part[here, one]
            entered = np.bincount(mine, warps.sum(1), len(self.code.blocks)).astype(np.int64)
            by_instruction = (self.counts.requests, self.counts.wavefronts, self.counts.sectors, self.passed)
            found.append(Run(entered, mine, warps, *(counts[:, one] for counts in by_instruction), asked[one]))
        return found

    def _step(self, block: int, mask: np.ndarray) -> None:
        whole = np.count_nonzero(mask) == self.live_count
        warps = mask.reshape(-1, WARP).any(1)
        self.trace.append((block, warps))
        if refused := self.machine.refused(block):
            raise ValueError(f"`{refused.text}` depends on what memory holds, or on what semantics.py lacks")
        condition = self._body(block, whole)(mask, None if whole else np.repeat(warps, WARP))
        self._leave(block, mask, condition)

    def _body(self, block: int, whole: bool) -> Callable:
        if (block, whole) not in self._bodies:
            exec(self.machine.body(block, whole), self._names)
            self._bodies[block, whole] = self._names["body"]
        return self._bodies[block, whole]

    def _leave(self, block: int, mask: np.ndarray, condition: np.ndarray | None) -> None:
        """Where the threads go from the end of a block."""
        last = self.code.blocks[block].instructions[-1]
        leave = getattr(self, f"_leave_{last.opcode.lower()}", None)
        if leave is None:
            self._go(block + 1, mask)
        else:
            leave(last, block, mask, condition)

    def _leave_bra(self, last: Sass, block: int, mask: np.ndarray, condition: np.ndarray | None) -> None:
        if not self.code.is_followed(last):
            self._go(block + 1, mask)
            return
        self._go(self.code.target(last), mask if condition is None else mask & condition)
        if condition is not None:
            self._go(block + 1, mask & ~condition)

    _leave_call = _leave_bra

    def _leave_ret(self, last: Sass, block: int, mask: np.ndarray, condition: np.ndarray) -> None:
        for address in np.unique(condition[mask]):
            self._go(self.code.at[int(address)], mask & (condition == address))

    _leave_brx = _leave_ret

    def _leave_exit(self, last: Sass, block: int, mask: np.ndarray, condition: np.ndarray | None) -> None:
        ended = mask if condition is None else mask & condition
        self.live = self.live & ~ended
        self.live_count = int(np.count_nonzero(self.live))
        self._go(block + 1, mask & ~ended)
        self._release()

    def _leave_bssy(self, last: Sass, block: int, mask: np.ndarray, condition: None) -> None:
        barrier = last.operands[0]
        others = self._parties.get(barrier)
        if others is not None:
            others = others & ~np.repeat(mask.reshape(-1, WARP).any(1), WARP)
        self._parties[barrier] = mask if others is None else others | mask
        self._go(block + 1, mask)

    def _leave_bsync(self, last: Sass, block: int, mask: np.ndarray, condition: None) -> None:
        place = last.operands[0], block + 1
        self._waiting[place] = self._waiting[place] | mask if place in self._waiting else mask
        self._release()

    def _leave_break(self, last: Sass, block: int, mask: np.ndarray, condition: np.ndarray | None) -> None:
        gone = mask if condition is None else mask & condition
        barrier = next(one for one in last.operands if one.startswith("B"))
        self._parties[barrier] = self._parties[barrier] & ~gone
        self._go(block + 1, mask)
        self._release()

    def _leave_unknown(self, last: Sass, *_: object) -> None:
        raise ValueError(f"`{last.text}` is a branch that warp.py does not follow")

    _leave_jmp = _leave_jmx = _leave_kill = _leave_unknown

    def _release(self) -> None:
        """Let warps go on of which every thread that takes part waits."""
        for place, waiting in list(self._waiting.items()):
            missing = self._parties[place[0]] & self.live & ~waiting
            ready = waiting & np.repeat(~missing.reshape(-1, WARP).any(1), WARP)
            if ready.any():
                self._go(place[1], ready)
                left = waiting & ~ready
                if left.any():
                    self._waiting[place] = left
                else:
                    del self._waiting[place]

    def _go(self, block: int, mask: np.ndarray) -> None:
        if not mask.any():
            return
        if block in self._groups:
            self._groups[block] = self._groups[block] | mask
        else:
            self._groups[block] = mask
            heapq.heappush(self._heap, block)

    def _pass(self, number: int, active: np.ndarray) -> None:
        self.passed[number] += active.reshape(self.count, -1, WARP).any(2).sum(1)

    def _namespace(self, programs: Sequence[tuple[Launch, Sequence[int]]]) -> dict[str, object]:
        count = len(self.threads)
        zeros, false = np.zeros(count, np.uint32), np.zeros(count, bool)
        places = np.repeat(np.array([place for _, place in programs]), count // self.count, axis=0)
        special = {f"SR_CTAID.{axis}": places[:, i] for i, axis in enumerate("XYZ")}
        special |= {"SR_TID.X": self.threads, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": 0}
        special["SR_LANEID"] = self.threads % WARP
        banks = _Banks([launch for launch, _ in programs], self.machine, count)
        registers = {kind: [zeros if kind in "RU" else false] * size for kind, size in _COUNTS.items()}
        return {
            **NAMES, **registers, "n": banks.number, "k": banks.word, "gather": banks.gather,
            "s": lambda name: (zeros + special[name]).astype(np.uint32), "ask": self.counts.ask, "passing": self._pass,
            "z": zeros, "z64": np.zeros(count, np.uint64), "true": ~false, "false": false,
        }  # fmt: skip


class _Banks:
    """Constant memory: bank 0 holds the parameters of each program's launch, bank 2 is the same for all."""

    def __init__(self, launches: Sequence[Launch], machine: Machine, lanes: int) -> None:
        self._lanes, self._each = lanes, lanes // len(launches)
        self._banks = {
            0: np.stack([_constant_bank(launch, machine.arch) for launch in launches]),
            2: machine.constants[None],
        }
        self._numbers: dict[int, np.ndarray] = {}
        self._words: dict[tuple[int, int], np.ndarray] = {}

    def number(self, n: int) -> np.ndarray:
        if n not in self._numbers:
            self._numbers[n] = np.full(self._lanes, n, np.uint32)
        return self._numbers[n]

    def word(self, offset: int, bank: int) -> np.ndarray:
        """What lies there, for every lane."""
        if (offset, bank) not in self._words:
            words = self._banks[bank][:, offset // 4]
            same = (words == words[0]).all()
            self._words[offset, bank] = self.number(int(words[0])) if same else np.repeat(words, self._each)
        return self._words[offset, bank]

    def gather(self, offsets: np.ndarray, bank: int) -> np.ndarray:
        words = self._banks[bank]
        places = np.minimum(offsets >> 2, words.shape[1] - 1)
        return words[0, places] if len(words) == 1 else words[np.arange(self._lanes) // self._each, places]


def _constant_bank(launch: Launch, arch: int) -> np.ndarray:
    data = bytearray(PARAMETERS[arch] + len(launch.parameters) + 64)
    data[PARAMETERS[arch] : PARAMETERS[arch] + len(launch.parameters)] = launch.parameters
    for first, numbers in zip(SIZES[arch], ((launch.threads, 1, 1), launch.grid), strict=True):
        for place, number in enumerate(numbers):
            data[first + 4 * place : first + 4 * place + 4] = int(number).to_bytes(4, "little")
    return np.frombuffer(bytes(data[: len(data) // 4 * 4]), np.uint32)

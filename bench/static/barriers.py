"""Checks that the compiler keeps the barriers of a Triton kernel in place.

If threads of a program read device memory that other threads of the program wrote, the source needs a barrier between
the two. `traffic.Counter.hazards` checks in the interpreter that it has one. This file checks that compilation does
not drop a barrier or move a load or store across it, as a pipelined loop could. Barriers (tl.debug_barrier()) divide
the program into parts. Each part must have loads and stores from the same source lines in Triton's first IR and in the
PTX.
"""

from __future__ import annotations

import re
from collections import Counter

Access = tuple[str, str]  # "load" or "store", "file:line:column"
Part = frozenset[Access]
ELSEWHERE = "elsewhere"


def moved(compiled) -> list[str]:
    """What other parts there are in ``compiled.asm["ptx"]`` than in ``compiled.asm["ttir"]``, in words."""
    ir = parts_of_ir(compiled.asm["ttir"])
    ptx = parts_of_ptx(compiled.asm["ptx"], barriers_of_ir(compiled.asm["ttir"]))
    # An unmasked load may get the place of the operation that uses it.
    places = {access for part in ir for access in part} & {access for part in ptx for access in part}
    wanted, found = (Counter(_known(part, places) for part in parts) for parts in (ir, ptx))
    return [
        f"{sorted(part)} lie between barriers {where}"
        for where, parts in (("in the source, not in the PTX", wanted - found), ("in the PTX alone", found - wanted))
        for part in parts
        if part
    ]


def _known(part: Part, places: set[Access]) -> Part:
    return frozenset((kind, place if (kind, place) in places else ELSEWHERE) for kind, place in part)


# ---- parts: stretches of code that control flow joins without a barrier ---------------------------------------------


class _Parts:
    """Stretches of a text, in order, and which of them belong together."""

    def __init__(self) -> None:
        self.accesses: list[set[Access]] = [set()]
        self._parent = [0]

    @property
    def here(self) -> int:
        return len(self.accesses) - 1

    def begin(self) -> None:
        self._parent.append(len(self.accesses))
        self.accesses.append(set())

    def join(self, one: int, other: int) -> None:
        self._parent[self._root(other)] = self._root(one)

    def _root(self, stretch: int) -> int:
        while self._parent[stretch] != stretch:
            stretch = self._parent[stretch]
        return stretch

    def joined(self) -> list[Part]:
        together: dict[int, set[Access]] = {}
        for stretch, accesses in enumerate(self.accesses):
            together.setdefault(self._root(stretch), set()).update(accesses)
        return [frozenset(accesses) for accesses in together.values()]


_BARRIER = r"(?:gpu|ttg)\.(?:local_)?barrier"


def parts_of_ir(ttir: str) -> list[Part]:
    """The IR nests: what precedes a loop, its end and what follows are one part, whatever barriers it has inside."""
    places, parts = _places(ttir), _Parts()
    opened: list[int] = []
    for line in ttir.splitlines():
        text = line.strip()
        if re.match(r"\}(?!\))", text) and opened:
            parts.join(opened.pop(), parts.here)
        if re.search(_BARRIER, text):
            parts.begin()
        elif access := re.search(r"\btt\.(load|store) ", text):
            parts.accesses[-1].add((access.group(1), places[_location(text)]))
        if re.search(r"\bscf\.|^\}", text) and re.search(r"\{( loc\(.*\))?$", text):
            opened.append(parts.here)
    return parts.joined()


def barriers_of_ir(ttir: str) -> set[str]:
    """Where the source calls tl.debug_barrier()."""
    places = _places(ttir)
    return {places[_location(line)] for line in ttir.splitlines() if re.search(_BARRIER, line)}


def _location(line: str) -> str:
    return re.search(r"loc\((#loc\d*)\)$", line.strip()).group(1)


def _places(ttir: str) -> dict[str, str]:
    """Every #loc of the IR as "file:line:column" in the innermost function."""
    defined = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def place(text: str) -> str:
        if position := re.match(r'"([^"]*)":(\d+:\d+)', text):
            return f"{position.group(1).rpartition('/')[2]}:{position.group(2)}"
        inner = re.search(r"#loc\d*", text)
        return place(defined[inner.group(0)]) if inner else ""

    return {name: place(text) for name, text in defined.items()}


def parts_of_ptx(ptx: str, barriers: set[str]) -> list[Part]:
    """Basic blocks, cut at what was compiled from the places in ``barriers`` and joined along every branch."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) .*?([^"/]*)"\s*$', ptx, re.MULTILINE))
    parts, labels, branches = _Parts(), {}, []
    place, falls_through = "", True
    for line in ptx.splitlines():
        if position := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", line):
            place = f"{files[position.group(1)]}:{position.group(2)}:{position.group(3)}"
        elif label := re.match(r"(\$L__BB\w+):", line):
            parts.begin()
            labels[label.group(1)] = parts.here
            if falls_through:
                parts.join(parts.here - 1, parts.here)
            falls_through = True
        elif re.search(r"\bbar(rier)?\.sync", line) and place in barriers:
            parts.begin()
        elif target := re.search(r"\bbra\S*\s+(\$L__BB\w+)", line):
            branches.append((parts.here, target.group(1)))
            falls_through = "@" in line
        elif re.match(r"\s*ret;", line):
            falls_through = False
        elif access := re.search(r"\b(ld|st|cp\.async\S*)\.(?:\w+\.)*global", line):
            parts.accesses[-1].add(("store" if access.group(1) == "st" else "load", place))
    for origin, target in branches:
        parts.join(origin, labels[target])
    return parts.joined()

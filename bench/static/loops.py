"""Loops of a control flow graph, a list of the successors of each block; block 0 is the entry.

A loop has one header that dominates all its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Graph = Sequence[Sequence[int]]


@dataclass
class Loop:
    """``blocks`` of the loop with those of the loops inside, which are ``inner``, in the order they are reached in;
    ``always`` holds those that every trip passes."""

    header: int
    blocks: set[int]
    inner: list[Loop] = field(default_factory=list)
    always: set[int] = field(default_factory=set)

    @property
    def own(self) -> set[int]:
        """Blocks that belong to no loop inside."""
        return self.blocks.difference(*(loop.blocks for loop in self.inner))


def loops(graph: Graph) -> Loop:
    """The loops of a graph below one that stands for the whole text."""
    dominators = _dominators(graph)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    predecessors = _predecessors(graph)
    for block, successors in enumerate(graph):
        for header in successors:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_body(block, header, predecessors))
                latches.setdefault(header, []).append(block)
    order = {block: place for place, block in enumerate(_in_order(graph))}
    reached = {block for block, above in enumerate(dominators) if above}
    whole = Loop(-1, reached, always=reached)
    for header in sorted(bodies, key=lambda one: -len(bodies[one])):
        parent = whole
        while inside := next((loop for loop in parent.inner if bodies[header] <= loop.blocks), None):
            parent = inside
        always = bodies[header].intersection(*(dominators[latch] for latch in latches[header]))
        parent.inner.append(Loop(header, bodies[header], always=always))
        parent.inner.sort(key=lambda loop: order[loop.header])
    return whole


def _in_order(graph: Graph) -> list[int]:
    """Blocks in the order of control: each behind those that lead to it, but for the ends of loops."""
    seen, finished, stack = {0}, [], [(0, iter(graph[0]))]
    while stack:
        block, successors = stack[-1]
        fresh = next((one for one in successors if one not in seen), None)
        if fresh is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(graph[fresh])))
    return finished[::-1]


def _predecessors(graph: Graph) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in graph]
    for block, successors in enumerate(graph):
        for successor in successors:
            found[successor].append(block)
    return found


def _dominators(graph: Graph) -> list[set[int]]:
    """Of each block; none of one that cannot be reached."""
    reached, todo = {0}, [0]
    while todo:
        fresh = [successor for successor in graph[todo.pop()] if successor not in reached]
        reached.update(fresh)
        todo += fresh
    predecessors = _predecessors(graph)
    found = [set(reached) if block in reached else set() for block in range(len(graph))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            above = [found[one] for one in predecessors[block] if one in reached]
            fresh = set.intersection(*above) | {block}
            if fresh != found[block]:
                found[block], changed = fresh, True
    return found


def _body(latch: int, header: int, predecessors: list[list[int]]) -> set[int]:
    found, todo = {latch}, [latch] if latch != header else []
    while todo:
        for block in predecessors[todo.pop()]:
            if block != header and block not in found:
                found.add(block)
                todo.append(block)
    return found

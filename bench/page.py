"""Tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Container, Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], text: Container[str] = ()) -> str:
    """Rows of cells under ``head``. The first column and those of ``text`` are words, the others numbers."""
    rule = ["---" if number == 0 or name in text else "---:" for number, name in enumerate(head)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])

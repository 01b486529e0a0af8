"""The report of `focalnet.patch`: one entry for each module, printed as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One candidate for patching: a focal modulation, a block around one, or patch embeddings that pad.

    Attributes:
        name: the module's name in the model.
        kind: "modulation", "block" or "patch embeddings".
        source: the code base whose structure the module has; None if unknown.
        reason: why the module was left alone; None if it was replaced.
    """

    name: str
    kind: str
    source: str | None
    reason: str | None


@dataclass(frozen=True)
class PatchReport:
    """All entries, in the order of ``model.named_modules()``. ``print(report)`` shows them as a table."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the modules that were replaced."""
        return tuple(entry.name for entry in self.entries if entry.reason is None)

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules that were left alone, with the reason."""
        return {entry.name: entry.reason for entry in self.entries if entry.reason is not None}

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.replaced)} replaced, {len(self.left)} left alone")
        for column in ("module", "what", "structure of", ""):
            table.add_column(column, overflow="fold")
        for entry in self.entries:
            outcome = "replaced" if entry.reason is None else f"left alone: {entry.reason}"
            table.add_row(entry.name, entry.kind, entry.source or "unknown", outcome)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()

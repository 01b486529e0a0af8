"""The output of commands on images: tables on stdout, skipped files and a progress bar on stderr."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UserError, complain, printable
from .images import Skipped
from .inference import Classified

if TYPE_CHECKING:
    from rich.progress import Progress


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("this draws figures with matplotlib, which is not installed; pip install matplotlib")


def report(skipped: list[Skipped]) -> None:
    """Print a line for each skipped path to stderr."""
    for one in skipped:
        complain("skipped", f"{one.path}: {one.error}")


def print_tables(classified: list[Classified]) -> None:
    """Print a table for each image."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for image in classified:
        # Text objects, because rich would interpret markup in paths and labels given as strings.
        table = Table(title=Text(printable(image.path), overflow="fold"), title_justify="left", title_style="bold")
        table.add_column("label", overflow="fold", min_width=24)
        table.add_column("probability", justify="right")
        for prediction in image.predictions:
            table.add_row(Text(printable(prediction.label)), f"{prediction.probability:.2%}")
        console.print(table)


class Bar:
    """A progress bar on stderr, shown only if stderr is a terminal."""

    def __init__(self, doing: str, total: int, wanted: bool) -> None:
        self._progress = _new_bar(doing) if wanted and sys.stderr.isatty() else None
        self._total = total

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._task = self._progress.add_task("", total=self._total)
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, done)

    @contextmanager
    def aside(self, done: int) -> Iterator[None]:
        """Hide the bar while the body prints, because both may share a terminal, then advance it by ``done``."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        yield
        self._progress.advance(self._task, done)
        self._progress.start()


def _new_bar(doing: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (doing, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Do not redirect stdout: it may be a pipe.
    return Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )

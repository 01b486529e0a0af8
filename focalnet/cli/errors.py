"""Reports errors to the user: one line on stderr and exit code 2, and a traceback only with --debug."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

USAGE_ERROR = 2
"""Exit code if nothing could be done: bad arguments, no image, no such model."""

SOME_SKIPPED = 1
"""Exit code if part of the work was skipped and the rest was done."""

# Exceptions that bad input raises here, in torch and in transformers. Others may be bugs and are shown with their
# type.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError)
_settings = {"tracebacks": False}


class UserError(ValueError):
    """An error that the user can fix. The message names the given value, the expected value and what to do."""


def show_tracebacks(wanted: bool) -> None:
    """Set whether `one_line` lets exceptions through, so that Python prints their tracebacks."""
    _settings["tracebacks"] = wanted


def complain(kind: str, message: str) -> None:
    """Print ``kind: message`` to stderr, on one line."""
    typer.echo(f"{typer.style(kind + ':', fg='red', bold=True)} {in_one_line(message)}", err=True)


def in_one_line(message: object) -> str:
    """The message without line breaks and without unprintable bytes, which file names may contain."""
    return printable(" ".join(str(message).split()))


def printable(text: str) -> str:
    """``text`` with a replacement for each byte that is not valid text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def one_line(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: its exceptions become one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if _settings["tracebacks"]:
                raise
            _fail(error)

    return wrapper


def _fail(error: Exception) -> NoReturn:
    message = str(error) or type(error).__name__
    if not isinstance(error, _EXPECTED):
        message = f"{type(error).__name__}: {message} (`focalnet --debug ...` shows where)"
    complain("error", message)
    raise typer.Exit(USAGE_ERROR) from None

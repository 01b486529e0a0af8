"""The command line: ``focalnet info | classify | explain | evaluate | finetune | ...``.

Each command has its own file. Slow imports are inside the commands that need them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import errors
from .bench import bench
from .classify import classify
from .convert import convert
from .evaluate import evaluate
from .explain import explain
from .finetune import finetune
from .info import info
from .pretrain import pretrain
from .serve import app as app_command
from .tune import tune

__all__ = ["app", "main"]

app = typer.Typer(
    name="focalnet",
    help="FocalNet for PyTorch: what runs here and how fast; classify, explain, check accuracy, train, convert.",
    no_args_is_help=True,
    # `errors.one_line` reports errors. With --debug Python prints its own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        typer.echo(f"focalnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FOCALNET_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    errors.show_tracebacks(debug)


for _command in (info, classify, explain, evaluate, finetune, pretrain, convert, bench, tune):
    app.command()(errors.one_line(_command))
app.command("app")(errors.one_line(app_command))


def main() -> None:
    """The entry point of the ``focalnet`` command."""
    app(prog_name="focalnet")

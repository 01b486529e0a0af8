"""``focalnet convert``: converts a checkpoint from one format to another."""

from __future__ import annotations

import json
import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError
from .models import UseEma, parse_fields, reading, silence_transformers


class Format(str, Enum):
    transformers = "transformers"
    authors = "authors"
    authors_detection = "authors-detection"
    timm = "timm"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory, a checkpoint file, or a hub id, in any format.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A directory for transformers, else a .pth or .safetensors file.")
    ],
    to: Annotated[Format, typer.Option("--format", "-f", help="Format to write.")] = Format.transformers,
    variant: Annotated[
        str | None, typer.Option(help="The published variant, if SRC does not determine it, e.g. large_fl4.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A configuration field, e.g. normalize_modulator=true."),
    ] = None,
    use_ema: UseEma = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST.")] = False,
) -> None:
    """Convert a checkpoint between the formats of transformers, the authors and timm. No value changes."""
    from .. import convert_checkpoint

    silence_transformers()
    # Its warnings are printed below as notes, with the options of this command.
    logging.getLogger(convert_checkpoint.__module__).setLevel(logging.ERROR)
    _refuse_to_overwrite(destination, force)
    with reading(source, "SRC"):
        done = convert_checkpoint(
            source, destination, to.value, variant=variant, use_ema=use_ema, **parse_fields(fields)
        )
    typer.echo(f"read     {done.source}: a {done.kind} in the format {done.source_format}")
    typer.echo(f"wrote    {done.path}: {done.format}, {done.tensors} tensors, {done.parameters:,} parameters")
    for note in done.notes:
        typer.echo(f"note     {note}")
    if done.pass_when_reading:
        options = (f"--set {name}={json.dumps(value)}" for name, value in done.pass_when_reading.items())
        typer.echo(f"note     the format {done.format} does not record everything; read it with {' '.join(options)}")


def _refuse_to_overwrite(destination: Path, force: bool) -> None:
    there = any(destination.iterdir()) if destination.is_dir() else destination.exists()
    if there and not force:
        raise UserError(f"DST {destination} already exists; choose another name, or overwrite it with --force")

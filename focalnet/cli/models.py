"""Loads models for the command line from a file, a directory or the Hugging Face hub.

The libraries' messages are silenced, and without network loading fails within seconds.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pretrained import shipped
from .errors import UserError, in_one_line
from .sources import refuse_what_is_no_checkpoint

if TYPE_CHECKING:
    from ..models.modeling import FocalNetForImageClassification

_SECONDS_TO_ANSWER = 4

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A directory, a checkpoint file, a hub id such as microsoft/focalnet-tiny, or digits."
    ),
]
Variant = Annotated[
    str | None, typer.Option(help="The published variant, if a file does not determine it, e.g. large_fl4.")
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A configuration field that a file does not determine."),
]
UseEma = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="Use the averaged weights of a training script's file, or the plain ones.",
        show_default="averaged, if there are any",
    ),
]


def silence_transformers() -> None:
    """Turn off transformers' progress bars and its messages, which would mix with the command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stay_offline_unless_reachable() -> bool:
    """Check within seconds whether the hub answers; if it does not, restrict huggingface_hub to its cache.

    Without this check huggingface_hub would retry for a minute. Returns whether the hub answered.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS_TO_ANSWER).close()
    except HTTPError:
        return True  # an error status is an answer too
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def parse_fields(assignments: list[str] | None) -> dict[str, Any]:
    """``["depths=[2,2]", "use_layerscale=true"]`` -> ``{"depths": [2, 2], "use_layerscale": True}``."""
    parsed = {}
    for assignment in assignments or []:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"--set: expected FIELD=VALUE, got {assignment}")
        parsed[name.strip()] = _parse(value)
    return parsed


def _parse(text: str) -> Any:
    """The value of a JSON or Python literal; any other text is a string."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


@contextmanager
def reading(model: str, argument: str) -> Iterator[None]:
    """A context for reading ``model``. It fails fast without network, and starts error messages with ``argument``."""
    if not Path(model).expanduser().exists() and shipped(model) is None:
        stay_offline_unless_reachable()
    try:
        refuse_what_is_no_checkpoint(model)
        yield
    except (ValueError, TypeError, OSError) as error:
        # The library's message begins with its own argument or the file, which would repeat ``argument``.
        reason = in_one_line(error).removeprefix("path_or_id: ").removeprefix(f"{Path(model).expanduser()}: ")
        hint = " (here: --variant NAME, --set FIELD=VALUE)" if "Pass " in reason else ""
        raise UserError(f"{argument} {model}: {reason}{hint}") from error


def load_classifier(
    model: str, variant: str | None, fields: dict[str, Any], use_ema: bool | None = None
) -> FocalNetForImageClassification:
    """Load the classifier ``model``, in evaluation mode.

    Raises:
        UserError: it does not exist, cannot be read, or cannot classify colour images.
    """
    from .. import FocalNetForImageClassification, load_checkpoint

    with reading(model, "--model"):
        loaded = load_checkpoint(model, variant=variant, use_ema=use_ema, **fields)
        if not isinstance(loaded, FocalNetForImageClassification):
            raise UserError(f"expected a classifier, this holds a {type(loaded).__name__}")
        if (loaded.config.num_labels or 0) < 1 or loaded.config.problem_type == "regression":
            raise UserError("expected a model with class labels, this one has none")
        if loaded.config.num_channels != 3:
            raise UserError(
                f"expected a model of colour images, with num_channels 3, this one has {loaded.config.num_channels}"
            )
    return loaded

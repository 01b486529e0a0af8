"""What `focalnet tune` measured on a GPU: for each kind of call the fastest backend and the fastest plan of Triton.

It is used only if asked for. FOCALNET_TUNED=1 reads ``tuned.json`` in the cache folder, any other value is the path of
a file. An entry counts only on the GPU, with the driver and the versions that it was measured with.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._version import __version__
from .problem import Problem

logger = logging.getLogger(__name__)

_ENVIRONMENT_VARIABLE = "FOCALNET_TUNED"
FORMAT = 1
BACKENDS = ("triton", "cuda")


class Choice(NamedTuple):
    """The fastest backend, Triton's fastest plan (None: that of its table), and the seconds of each backend."""

    backend: str
    plan: dict[str, Any] | None
    seconds: dict[str, float]


def default_file() -> Path:
    """``tuned.json`` in $FOCALNET_CACHE_DIR, else in ``focalnet`` below $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("FOCALNET_CACHE_DIR"):
        return Path(folder, "tuned.json")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "focalnet", "tuned.json")


def file_asked_for() -> Path | None:
    """The file that FOCALNET_TUNED asks for; None if it is unset, empty or 0."""
    value = os.environ.get(_ENVIRONMENT_VARIABLE, "0")
    if value in ("", "0"):
        return None
    return default_file() if value == "1" else Path(value).expanduser()


def choice(problem: Problem) -> Choice | None:
    """What was measured for calls like this one, if that was asked for and holds here."""
    path = file_asked_for()
    if path is None or problem.device.type != "cuda":
        return None
    return _choices(path, problem.device).get(key(problem))


def key(problem: Problem) -> str:
    """A kind of call in words, such as "focal_modulation bfloat16 128x56x56x96 3x3 5x5 7x7"."""
    shape = "x".join(map(str, (problem.batch, problem.height, problem.width, problem.channels)))
    kernels = " ".join("x".join(map(str, size)) for size in problem.kernel_sizes)
    return f"{problem.operator} {str(problem.dtype).removeprefix('torch.')} {shape} {kernels}"


def facts(device: torch.device) -> dict[str, str | None]:
    """What a measurement depends on beside the call."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "focalnet": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _driver(path: str = "/proc/driver/nvidia/version") -> str | None:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+[\d.]+)\s", Path(path).read_text())
    except OSError:
        found = None
    # Where there is no such file: the latest CUDA that the driver supports.
    return found[1] if found else str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the file: {"format": 1, "gpus": [{"facts": facts(device), "calls": {key: Choice as a dictionary}}]} ------------


@functools.cache
def _choices(path: Path, device: torch.device) -> dict[str, Choice]:
    """The choices of a file that hold on ``device``. The file is read once in a process."""
    try:
        gpus = read(path)
    except FileNotFoundError:
        logger.warning("%s asks for %s, which does not exist; `focalnet tune` writes it", _ENVIRONMENT_VARIABLE, path)
        return {}
    except ValueError as error:
        logger.warning("%s is not used: %s; `focalnet tune` writes it again", path, error)
        return {}
    here = facts(device)
    for gpu in gpus:
        if (reason := why_not(gpu["facts"], here)) is None:
            return {name: Choice(**found) for name, found in gpu["calls"].items()}
        logger.debug("%s: not used: %s", path, reason)
    return {}


def why_not(measured: Mapping[str, object], here: Mapping[str, object]) -> str | None:
    """Why measurements made with the facts ``measured`` do not hold with those that are ``here``, or None."""
    different = [name for name in here if measured.get(name) != here[name]]
    return "; ".join(f"{name} was {measured.get(name)}, is {here[name]}" for name in different) or None


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, one for each GPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of this format.
    """
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected the format {FORMAT} of this version")
    try:
        for gpu in document["gpus"]:
            dict(gpu["facts"])
            for found in gpu["calls"].values():
                _check(Choice(**found))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"an entry is not as expected: {error!r}") from None
    return document["gpus"]


def _check(found: Choice) -> None:
    if found.backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {found.backend!r}")
    if not isinstance(found.plan, dict | None) or not isinstance(found.seconds, dict):
        raise ValueError(f"plan, seconds: expected dictionaries, got {found.plan!r}, {found.seconds!r}")


def keep(path: Path, here: dict[str, str | None], choices: Mapping[str, Choice]) -> None:
    """Add ``choices`` to the file. What another driver or version measured on the same GPU goes.

    Other GPUs keep their entries, but a file that cannot be read is replaced.
    """
    try:
        gpus = read(path)
    except (FileNotFoundError, ValueError):
        gpus = []
    mine: dict[str, Any] = next((gpu["calls"] for gpu in gpus if gpu["facts"] == here), {})
    calls = mine | {name: found._asdict() for name, found in choices.items()}
    others = [gpu for gpu in gpus if gpu["facts"].get("gpu") != here["gpu"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that no reader sees half a file.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"format": FORMAT, "gpus": [*others, {"facts": here, "calls": calls}]}, indent=1))
    draft.replace(path)

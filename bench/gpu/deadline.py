"""Runs commands one after another within one deadline.

Each part reserves a minimum of time. A part may run until its own limit, or until the time left is what later parts
have reserved. So a slow part cannot use up the time of later parts. A part that reserved nothing and finds no time
left is listed with that outcome. A part that fails or is stopped does not stop the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

WORTHWHILE_S = 3.0  # a part with less time than this is not started
GRACE_S = 2.0  # between SIGTERM and SIGKILL of a part, within its time
SHOWN_LINES = 4


@dataclass(frozen=True)
class Part:
    """A command, the most seconds it may take, and those it is promised whatever the parts before it do."""

    name: str
    command: tuple[str, ...]
    limit: float
    promised: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a part ended ("passed", "failed (1)", "out of time", "no time left") and the seconds it took and had."""

    part: str
    status: str
    seconds: float
    allowed: float

    def row(self) -> dict[str, object]:
        return asdict(self)


def run_all(
    parts: list[Part],
    deadline: float,
    end_s: float,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], object] = print,
) -> list[Ended]:
    """Runs ``parts`` so that the last is over ``end_s`` before ``deadline`` (of time.monotonic).

    What part NAME prints goes to ``folder``/NAME.log, its last lines to ``say``.
    """
    ended = []
    for index, part in enumerate(parts):
        behind = sum(later.promised for later in parts[index + 1 :])
        allowed = min(part.limit, deadline - time.monotonic() - end_s - behind)
        say(f"== {part.name}: at most {max(0, allowed):.0f} s")
        if allowed < WORTHWHILE_S:
            ended.append(Ended(part.name, "no time left", 0.0, max(0.0, allowed)))
        else:
            log = folder / f"{part.name}.log"
            ended.append(_run(part, allowed, log, environment))
            for line in log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]:
                say(line)
        if ended[-1].status != "passed":
            say(f"   {part.name}: {ended[-1].status}")
    return ended


def _run(part: Part, allowed: float, log: Path, environment: Mapping[str, str]) -> Ended:
    start = time.monotonic()
    try:
        with log.open("wb") as output:
            # A session of its own: what the part starts can be ended with it.
            process = subprocess.Popen(
                part.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=dict(environment), start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        log.write_text(f"{error}\n")
        return Ended(part.name, "failed (could not start)", 0.0, allowed)
    try:
        status = process.wait(allowed - GRACE_S)
        outcome = "passed" if status == 0 else f"failed ({status})"
    except subprocess.TimeoutExpired:
        outcome = "out of time"
        _signal(process, signal.SIGTERM)
        _wait(process, start + allowed - time.monotonic())
    finally:
        # Whatever it has started and left, too; also when this command itself is interrupted.
        _signal(process, signal.SIGKILL)
        _wait(process, 1.0)
    return Ended(part.name, outcome, round(time.monotonic() - start, 1), round(allowed, 1))


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, seconds))

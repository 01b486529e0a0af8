"""Runs commands within one deadline: one after another, or some of them side by side.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

WORTHWHILE_S = 3.0  # a part with less time than this is not started
INTERRUPT_S = 6.0  # between SIGINT, on which pytest prints what failed, and SIGTERM of a part, within its time
GRACE_S = 2.0  # between SIGTERM and SIGKILL
SHOWN_LINES = 4
POLL_S = 0.05


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


Step = Part | tuple[Part, ...]  # a tuple runs side by side


def run_all(
    steps: Sequence[Step],
    deadline: float,
    end_s: float,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], object] = print,
    after: Callable[[Part], object] = lambda part: None,
) -> list[Ended]:
    """Runs ``steps`` so that the last is over ``end_s`` before ``deadline`` (of time.monotonic).

    What part NAME prints goes to ``folder``/NAME.log, its last lines to ``say``. ``after`` is called with every part
    that has ended.
    """
    ended = []
    for index, step in enumerate(steps):
        behind = sum(max(part.promised for part in parts_of(later)) for later in steps[index + 1 :])
        left = deadline - time.monotonic() - end_s - behind
        running = []
        for part in parts_of(step):
            allowed = min(part.limit, left)
            say(f"== {part.name}: at most {max(0, allowed):.0f} s")
            running.append(_Running(part, allowed, folder / f"{part.name}.log", environment))
        try:
            while sum(one.goes_on() for one in running):
                time.sleep(POLL_S)
        finally:
            # Also when this command itself is interrupted.
            for one in running:
                one.kill()
        for one in running:
            ended.append(one.ended)
            for line in one.last_lines():
                say(line)
            if one.ended.status != "passed":
                say(f"   {one.part.name}: {one.ended.status}")
            after(one.part)
    return ended


def parts_of(step: Step) -> tuple[Part, ...]:
    return step if isinstance(step, tuple) else (step,)


class _Running:
    """A part that runs in a session of its own, so that what it starts can be ended with it."""

    def __init__(self, part: Part, allowed: float, log: Path, environment: Mapping[str, str]) -> None:
        self.part, self.allowed, self.log = part, allowed, log
        self.start, self.process = time.monotonic(), None
        self.asked: list[int] = []  # signals that it was sent
        self.ended = Ended(part.name, "interrupted", 0.0, round(max(0.0, allowed), 1))
        if allowed < WORTHWHILE_S:
            self._end("no time left")
            return
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    part.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=dict(environment), start_new_session=True, preexec_fn=_heed_interrupts,
                )  # fmt: skip
        except OSError as error:
            log.write_text(f"{error}\n")
            self._end("failed (could not start)")

    def goes_on(self) -> bool:
        """Whether the part runs still. One that is late is asked to end, twice, and then it is made to."""
        if self.ended.status != "interrupted" or self.process is None:
            return False
        left, status = self.start + self.allowed - time.monotonic(), self.process.poll()
        if status is not None and not self.asked:
            self._end("passed" if status == 0 else f"failed ({status})")
        elif status is not None or left < 0:
            self._end("out of time")
        elif left < GRACE_S:
            self._ask(signal.SIGTERM)
        elif left < GRACE_S + min(INTERRUPT_S, self.allowed / 4):
            self._ask(signal.SIGINT)
        return self.ended.status == "interrupted"

    def _ask(self, number: int) -> None:
        if number not in self.asked:
            self.asked.append(number)
            _signal(self.process, number)

    def _end(self, status: str) -> None:
        seconds = 0.0 if self.process is None else time.monotonic() - self.start
        self.ended = Ended(self.part.name, status, round(seconds, 1), self.ended.allowed)
        self.kill()

    def kill(self) -> None:
        """End whatever the part has started and left, too."""
        if self.process is not None:
            _signal(self.process, signal.SIGKILL)
            _wait(self.process, 1.0)

    def last_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if self.log.exists() else []


def _heed_interrupts() -> None:
    """Commands that a shell starts in the background ignore SIGINT, and so would the parts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, seconds))

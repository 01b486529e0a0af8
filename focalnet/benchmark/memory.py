"""Peak memory of this process, and what of it came after a moment, such as when all libraries were loaded."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Peak:
    """Watches this process from now on.

    Linux can restart a process's record of its peak (proc(5), clear_refs). Elsewhere only the peak of the whole
    process is known.
    """

    def __init__(self) -> None:
        self._before = self.of_process_so_far()
        self._start = _resident("VmRSS") if _restarted() else None

    @staticmethod
    def of_process_so_far() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def of_process(self) -> int:
        """The most bytes that the process has had in memory since it began."""
        return max(self._before, self.of_process_so_far())

    def since(self) -> int | None:
        """The most bytes that were added since this watch began; None where the system cannot say."""
        return None if self._start is None else _resident("VmHWM") - self._start


def _restarted() -> bool:
    """Start a new record of the peak, and say whether that worked."""
    try:
        CLEAR_REFS.write_text("5")
        return STATUS.exists()
    except OSError:
        return False


def _resident(name: str) -> int:
    """Bytes in memory now (``VmRSS``), or the record of the most (``VmHWM``)."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{STATUS} has no {name}")
    return int(match[1]) * 1024

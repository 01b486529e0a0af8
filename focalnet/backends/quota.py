"""How many processors this process may use: those of its affinity mask, and the quota of its control groups.

A container "limited to 1.5 processors" has a quota: its threads together get 150 ms of every 100 ms. PyTorch takes as
many threads as there are processors. On many of them these threads use the quota up at once, and all of them then
stand still until the period ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def processors(folder: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """The quota in processors, such as 1.5: the least of the process's control groups and their ancestors, or None.

    Reads cpu.max (version 2), and cpu.cfs_quota_us and cpu.cfs_period_us (version 1).
    """
    quotas = [quota for group in _groups(folder, membership) if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def most_threads(quota: float | None) -> int | None:
    """The most threads of the extension's own that are of use; None if the user has set a number (OMP_NUM_THREADS).

    A quota of 1.5 gives two threads. Both together may stand still for a part of a period, but one would leave a third
    of the quota unused, and a forward that ends early in its period does not meet the limit at all.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return affinity if quota is None else min(affinity, max(1, math.ceil(quota)))


def _groups(folder: Path, membership: Path) -> Iterator[Path]:
    """The folders of the process's control groups and their ancestors, whether or not they exist."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Without a namespace of its own, a container sees the host's path, but its group is mounted at the top.
        group = PurePosixPath(path.lstrip("/").replace("../", ""))
        for mount in (folder / controllers, folder / "cpu") if controllers else (folder, folder / "unified"):
            for ancestor in (group, *group.parents):
                yield mount / ancestor


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)

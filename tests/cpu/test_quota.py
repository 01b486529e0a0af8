"""Threads of CPU inference under a quota of processors, as in a container limited to 1.5 of them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import OPS, require, threads

from focalnet.backends import quota

require("cpu_threads")

VERSION_1 = Path("/sys/fs/cgroup/cpu")
COUNT = "import focalnet, torch; print(torch.get_num_threads(), torch.ops.focalnet.cpu_threads())"


@pytest.fixture
def groups(tmp_path):
    """Makes files below a folder of control groups; returns what `processors` says of a process in these groups."""

    def make(membership, **files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "self").write_text(membership)
        return quota.processors(tmp_path, tmp_path / "self")

    return make


@pytest.mark.parametrize(
    "membership, files, expected",
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 20000\n"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../../other\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/elsewhere\n", {}, None),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            1.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        # The group of a container of version 1, mounted at the top, under the host's path.
        ("1:cpu:/docker/1f\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("1:memory:/a\n", {"memory/a/cpu.max": "50000 100000\n"}, None),
    ],
)
def test_the_quota_is_the_least_of_the_groups_of_the_process(groups, membership, files, expected):
    assert groups(membership, **files) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert quota.processors(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize("of_quota, expected", [(None, 8), (0.2, 1), (1.0, 1), (1.5, 2), (7.5, 8), (64.0, 8)])
def test_threads_fill_the_quota_and_not_more_than_the_affinity_mask(monkeypatch, of_quota, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert quota.most_threads(of_quota) == expected


def test_a_number_that_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert quota.most_threads(1.5) is None


@contextlib.contextmanager
def limited(most):
    OPS.cpu_limit_threads(most)
    try:
        yield
    finally:
        OPS.cpu_limit_threads(quota.most_threads(quota.processors()) or 0)


def test_the_limit_holds_until_torch_is_told_another_number():
    with threads(5), limited(2):
        assert OPS.cpu_threads() == 2
        with threads(3):
            assert OPS.cpu_threads() == 3
        assert OPS.cpu_threads() == 2
    with threads(5), limited(0):
        assert OPS.cpu_threads() == 5


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_call_starts_no_more_threads_than_the_limit():
    code = (
        "import os, torch, focalnet; torch.set_num_threads(6); ops = torch.ops.focalnet; ops.cpu_limit_threads(2);"
        "count = lambda: len(os.listdir('/proc/self/task'));"
        "x = torch.randn(64, 14, 14, 40); ops.cpu_norm_mean(x, None, None, 1e-5); before = count();"
        "torch.set_num_threads(4); ops.cpu_norm_mean(x, None, None, 1e-5); print(count() - before)"
    )
    # From one helper to three: the limit held before, and a number that was set later wins.
    assert printed(code) == "2"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_an_affinity_mask_of_one_processor_gives_one_thread():
    one = {min(os.sched_getaffinity(0))}
    assert printed(COUNT, preexec_fn=lambda: os.sched_setaffinity(0, one)) == "1 1"


@pytest.fixture
def one_processor():
    """The file `cgroup.procs` of a new control group with a quota of one processor."""
    group = VERSION_1 / f"focalnet-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    yield group / "cgroup.procs"
    group.rmdir()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor needs no quota")
def test_a_process_in_a_real_group_of_one_processor_uses_one_thread(one_processor):
    found = printed(COUNT, preexec_fn=lambda: one_processor.write_text(str(os.getpid())))
    assert found == f"{len(os.sched_getaffinity(0))} 1"


def printed(code, **more):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, **more).stdout.strip()

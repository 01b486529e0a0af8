"""bench/shared_cores.py: the ratios are those of the runs, and the other process stands still outside its turns."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import shared_cores

from focalnet.benchmark import rows
from focalnet.benchmark.runtimes import Case

CASE = Case("tiny_lrf", 64, 1)


def test_ratios_are_over_the_quiet_median_and_two_processes_share_one_throughput():
    found = shared_cores.row("focalnet", CASE, [1.0] * 9, [2.0] * 19 + [4.0], [2.5] * 8)
    assert (found["quiet_s"], found["loaded_ratio"], found["two_share"]) == (1.0, 2.0, pytest.approx(0.8))
    assert 2.0 < found["loaded_p95_ratio"] <= 4.0


def test_a_run_longer_than_a_turn_still_gives_what_a_percentile_needs(monkeypatch):
    monkeypatch.setattr(shared_cores, "TURN_S", 0.0)
    runs = shared_cores.turn(SimpleNamespace(run=lambda: 1.0))
    assert shared_cores.row("focalnet", CASE, runs, runs, runs)["loaded_p95_ratio"] == 1.0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="states of processes are read in /proc")
def test_the_load_runs_only_beside_a_loaded_turn(monkeypatch):
    monkeypatch.setattr(shared_cores, "LOAD", 'print("ready", flush=True)\nwhile True: pass\n')
    processes = []
    started = shared_cores.subprocess.Popen
    monkeypatch.setattr(
        shared_cores.subprocess, "Popen", lambda *a, **k: processes.append(started(*a, **k)) or processes[-1]
    )
    with shared_cores.load() as beside:
        assert state(processes[0]) == "T"
        with beside():
            assert state(processes[0]) == "R"
        assert state(processes[0]) == "T"
    assert processes[0].poll() is not None


def state(process, patience_s=5.0):
    """The state in /proc once it is no longer changing."""
    end = time.monotonic() + patience_s
    seen = []
    while len(seen) < 3 or len(set(seen[-3:])) > 1:
        seen.append(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        assert time.monotonic() < end, seen
        time.sleep(0.01)
    return seen[-1]


def test_a_runtimes_row_is_kept_only_where_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(shared_cores, "TURN_S", 0.05)
    monkeypatch.setattr(shared_cores, "facts", lambda device: {"device": "some CPU"})
    shared_cores.main("tiny_srf", 64, 1, ["focalnet"], 1, keep=True)
    (row,) = rows.read("shared_cores", "some CPU")
    assert row["quiet_s"] > 0 and row["two_share"] > 0
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "not asked for")
    monkeypatch.setattr(shared_cores, "measured", lambda *_: row)
    capsys.readouterr()
    shared_cores.main("tiny_srf", 64, 1, ["focalnet"], 1, keep=False)
    assert "focalnet" in capsys.readouterr().out
    assert rows.devices("shared_cores") == []

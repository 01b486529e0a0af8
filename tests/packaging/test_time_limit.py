"""A test that hangs fails within its limit and shows where every thread stood, whatever it hangs in."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGS = """
import collections, itertools, threading

def waits_beside():
    threading.Event().wait()

def test_hangs():
    threading.Thread(target=waits_beside, daemon=True).start()
    {hang}

def test_comes_next():
    pass
"""
IN_PYTHON = "threading.Event().wait()"
IN_C = "collections.deque(itertools.repeat(None), maxlen=0)  # keeps the interpreter to itself, and looks at no signal"


def outcome_of(hang, folder, *options):
    """Exit status and output of a run with the project's settings, but limits of 2 and 4 seconds."""
    (folder / "test_it.py").write_text(HANGS.format(hang=hang))
    limits = ["-o", "timeout=2", "-o", "faulthandler_timeout=4"]
    config = ["-c", ROOT / "pyproject.toml", "--rootdir", folder]
    command = [sys.executable, "-m", "pytest", *config, *limits, *options, folder]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_a_test_that_waits_for_ever_fails_alone(tmp_path):
    status, output = outcome_of(IN_PYTHON, tmp_path)
    assert status == 1
    assert "1 failed, 1 passed" in output
    assert "in waits_beside" in output


def test_c_code_that_never_returns_ends_the_run(tmp_path):
    status, output = outcome_of(IN_C, tmp_path)
    assert status == 1
    assert "Timeout (0:00:04)!" in output
    assert "in waits_beside" in output and "in test_hangs" in output


def test_c_code_that_never_returns_fails_alone_in_parallel_runs(tmp_path):
    """The process ends that ran it, and another one goes on with the next test."""
    status, output = outcome_of(IN_C, tmp_path, "-n", "1")
    assert status == 1
    assert "1 failed, 1 passed" in output and "crashed while running" in output
    assert "Timeout (0:00:04)!" in output
    assert "in waits_beside" in output and "in test_hangs" in output


@pytest.mark.parametrize("limit", ["timeout", "faulthandler_timeout"])
def test_every_test_has_both_limits(limit, pytestconfig):
    assert 0 < float(pytestconfig.getini(limit)) <= 600

"""What every test shares: the folder of helpers importable by name, one seed, no thread left over."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Each of pytest-xdist's processes, and whatever its tests start, has one processor. Tests about threads set their own
# number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

TESTS = Path(__file__).parent
# importlib mode puts nothing on sys.path. The scripts of bench/ import each other by name; they come last, so that
# they shadow no package.
sys.path.insert(0, str(TESTS / "helpers"))
sys.path += [str(TESTS.parent / "bench" / folder) for folder in ("", "gpu", "static")]

# Inductor's cache does not tell code for one instruction set from that for another: what a run with this variable
# leaves would be found by one without it, and write past the ends of its arrays.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Files with slow tests come first: what is left for the end is short, and no process waits long for another."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)

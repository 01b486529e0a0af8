"""What every test shares: the folder of helpers importable by name, one seed, no thread left over."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

import pytest
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

"""What every test shares: the folder of helpers importable by name, one seed, no thread left over."""

import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts nothing on sys.path; tests/ itself holds only modules of tests, none of which shadows a package.
sys.path.insert(0, str(Path(__file__).parent))
# The scripts of bench/ import each other by name; last, so that they shadow nothing either.
sys.path.append(str(Path(__file__).parent.parent / "bench"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

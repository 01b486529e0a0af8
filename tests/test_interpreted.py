"""Triton's interpreter runs kernels on a CPU, if asked before triton is imported: so each file gets a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_all_of_the_file_passes_in_the_interpreter(file):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=file.parents[1],
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", run.stdout, re.MULTILINE), run.stdout[-500:]

"""Imports run one way through the package: the floors are in pyproject.toml, and import-linter holds them."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_import_runs_back_up():
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    result = subprocess.run(
        [sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout
    assert "imports run one way KEPT" in result.stdout

"""What Triton's interpreter counts: bytes, addresses. Interpreted on every machine, with a GPU too.

The interpreter has to be chosen before triton is imported: so these tests have a pytest process of their own.
"""

import importlib.util
import os
import sys

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
    raise RuntimeError("triton was imported before tests/interpreted: run `pytest tests/interpreted` by itself")
else:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header():
    if importlib.util.find_spec("triton") is None:
        return "tests/interpreted is left out: triton is not installed"
    return None

"""The Triton kernels on a GPU, or run by Triton's interpreter where there is none.

The interpreter has to be chosen before triton is imported: so these tests have a pytest process of their own.
"""

import importlib.util
import os
import sys
import types

import numpy as np
import torch

IS_INTERPRETED = not torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif IS_INTERPRETED and "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
    raise RuntimeError(
        "triton was imported before tests/triton: run `pytest tests/triton` by itself, as make test does"
    )
elif IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patched, _patch = set(), interpreter._patch_lang

    def _patch_once(function):
        """The interpreter patches triton.language anew in each call of a device function, half of its time here."""
        if function not in _patched:
            _patched.add(function)
            _patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = _patch_once

    def _chained_dot(builder, left, right, acc, input_precision, max_num_imprecise_acc):
        """A product as a GPU's multiply-adds make it: a chain of float32 sums that starts at the accumulator."""
        total = acc.data.astype(np.float32)
        for column, row in zip(left.data.T.astype(np.float64), right.data.astype(np.float64), strict=True):
            total = (total + column[:, None] * row).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _chained_dot


def pytest_report_header():
    if importlib.util.find_spec("triton") is None:
        return "tests/triton is left out: triton is not installed"
    return f"triton: {'interpreted' if IS_INTERPRETED else 'compiled'}"

"""bench/python_share.py: what is Python's is told from what is an operator's, however long the operators take."""

import time

import pytest
import python_share
import torch

from focalnet.backends import extension, registry
from focalnet.benchmark import rows

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@needs_extension
@pytest.mark.parametrize("python_s", [0.0, 0.02])
def test_the_share_is_the_time_outside_operators(python_s):
    large = torch.randn(600, 600)

    def call():
        time.sleep(python_s)
        operator = registry._REGISTRY["cpu"].operators["linear"]
        return operator(operator(large, large, None), large, None)

    with python_share.timed_operators() as inside:
        share = python_share.measured(call, inside, 20)
    python, whole = share.python.row()["fastest_s"], share.whole.row()["fastest_s"]
    assert python_s <= python < python_s + 0.002
    assert whole > python + 0.002
    assert share.operators == 2


def test_an_operator_that_is_not_timed_is_refused():
    matrix = torch.ones(2, 2)
    with python_share.timed_operators() as inside, pytest.raises(RuntimeError, match=r"aten::mm ran, which"):
        python_share.measured(lambda: torch.mm(matrix, matrix), inside, 2)


def test_operators_are_themselves_again_afterwards():
    operators = registry._REGISTRY["cpu"].operators
    before = operators["linear"]
    with python_share.timed_operators():
        assert operators["linear"] is not before
    assert operators["linear"] is before


@needs_extension
def test_a_models_row_is_printed_and_kept_only_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(python_share, "facts", lambda: {"device": "some CPU"})
    python_share.main("tiny_srf", 64, 1, 3, keep=False)
    assert "whole forward" in capsys.readouterr().out
    assert rows.devices("python_share") == []
    python_share.main("tiny_srf", 64, 1, 3, keep=True)
    (row,) = rows.read("python_share", "some CPU")
    assert (row["variant"], row["size"], row["operators"]) == ("tiny_srf", 64, 18)
    assert 0 < row["median_s"] < row["forward_s"]

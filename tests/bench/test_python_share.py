"""bench/python_share.py: what is Python's is told from what is an operator's, however long the operators take."""

import time

import pytest
import python_share
import torch
from operands import Shape, operands

import focalnet
from focalnet.backends import extension
from focalnet.benchmark import rows
from focalnet.benchmark.runtimes import Case


@pytest.mark.parametrize("python_s", [0.0, 0.02])
def test_the_share_is_the_time_outside_operators(python_s):
    large = torch.randn(600, 600)

    def call():
        time.sleep(python_s)
        return large @ large @ large

    share = python_share.measured(call, 20)
    python, whole = share.python.row()["fastest_s"], share.whole.row()["fastest_s"]
    assert python_s <= python < python_s + 0.002
    assert whole > python + 0.002
    assert share.operators == 2


def test_operators_with_a_body_in_python_are_refused():
    arguments = operands(Shape())
    with pytest.raises(RuntimeError, match=r"focalnet::focal_modulation ran, whose body is Python"):
        python_share.measured(lambda: focalnet.focal_modulation(*arguments), 2)


def test_rows_are_printed_and_kept_only_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(python_share, "facts", lambda: {"device": "some CPU"})
    for make in ("ours", "theirs"):
        monkeypatch.setattr(python_share, make, lambda case: torch.nn.Conv2d(3, 8, 3))
    python_share.main("tiny_lrf", 32, 1, 3, keep=False)
    assert "transformers" in capsys.readouterr().out
    assert rows.devices("python_share") == []
    python_share.main("tiny_lrf", 32, 1, 3, keep=True)
    focalnets, _ = rows.read("python_share", "some CPU")
    assert (focalnets["runtime"], focalnets["variant"], focalnets["size"]) == ("focalnet", "tiny_lrf", 32)
    assert 0 < focalnets["median_s"] < focalnets["forward_s"]


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_a_models_forward_is_measured_whole():
    case = Case("tiny_srf", 64, 1)
    model = python_share.ours(case)
    with torch.inference_mode():
        share = python_share.measured(lambda: model(case.images(0)), 2)
    assert 0 < share.python.row()["median_s"] < share.whole.row()["median_s"]

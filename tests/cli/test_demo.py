"""``make demo``'s script, as a process without network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import offline_and_undone

import focalnet

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "COLUMNS": "80",
    }
    environment.pop("FOCALNET_BACKEND", None)
    return subprocess.run([sys.executable, DEMO], capture_output=True, text=True, env=environment, timeout=240)


def test_demo_succeeds_in_silence_about_anything_else(demo):
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""


def test_demo_says_plainly_that_weights_are_random_without_network(demo):
    assert "random weights" in demo.stdout
    assert "mean nothing" in demo.stdout


def test_held_out_digits_have_real_labels_and_both_read_them_alike(demo):
    read = re.findall(r"(\d) \| (\d)", demo.stdout)
    assert len(read) == 16
    assert all(theirs == ours for theirs, ours in read)
    assert len({ours for _, ours in read}) >= 5
    accuracies = re.search(r"accuracy +│ ([\d.]+)% +│ ([\d.]+)%", demo.stdout)
    assert accuracies[1] == accuracies[2] and float(accuracies[1]) >= 98.5
    assert len(re.findall(r"\d+ of 355", demo.stdout)) == 2


def test_both_top_5_lists_are_the_same(demo):
    rows = re.findall(r"│ (LABEL_\d+) +│ ([\d.]+%) │ (LABEL_\d+) +│ ([\d.]+%) │", demo.stdout)
    assert len(rows) == 5
    assert all(row[:2] == row[2:] for row in rows)


def test_difference_times_and_backend_are_printed(demo):
    relative = float(re.search(r"relative +│ ([\d.e+-]+), allowed 1e-05", demo.stdout)[1])
    assert relative <= 1e-5
    assert len(re.findall(r"[\d.]+ ms", demo.stdout)) == 4  # each model's, for the digits and for the photograph
    assert re.search(r"on backend (cpu|reference)", demo.stdout)


def test_the_line_to_change_comes_last(demo):
    assert demo.stdout.rstrip().splitlines()[-2:] == [
        "  - from transformers import FocalNetForImageClassification",
        "  + from focalnet import FocalNetForImageClassification",
    ]


def test_output_fits_a_terminal_of_80_columns(demo):
    assert max(map(len, demo.stdout.splitlines())) <= 80


class OffByATenThousandth(focalnet.FocalNetForImageClassification):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits *= 1.0001
        return output


def test_demo_fails_when_the_two_differ_by_more_than_rounding(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "FocalNetForImageClassification", OffByATenThousandth)
    monkeypatch.setattr(demo, "SECONDS", 0)
    with offline_and_undone(monkeypatch):
        assert demo.main() == 1
    assert "differ by more than" in capsys.readouterr().out

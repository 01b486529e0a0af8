"""Settings that spend memory or time otherwise make the same steps."""

import json

import pytest
from small_models import one_thread  # noqa: F401
from small_runs import PLAIN, class_folders, train

from focalnet.training import pretrain
from focalnet.training.saving import checkpoints

SETTINGS = PLAIN.but(crop_scale=(0.5, 1.0), flip=0.5, layer_decay=0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "squares")


def losses(data, folder, settings, task=None):
    train(data, folder, settings, **({} if task is None else {"task": task}))
    history = json.loads((checkpoints(folder / "checkpoints")[-1] / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    return losses(data, tmp_path_factory.mktemp("run") / "out", SETTINGS)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"batch_size": 4, "accumulate": 2}, 1e-5),
        ({"gradient_checkpointing": True}, 1e-6),
        ({"bf16": True}, 0.02),
    ],
    ids=["accumulation", "gradient checkpointing", "bfloat16"],
)
def test_losses_are_those_of_the_plain_run(changes, tolerance, data, expected, tmp_path):
    actual = losses(data, tmp_path / "out", SETTINGS.but(**changes))
    assert len(actual) == 8
    assert actual == pytest.approx(expected, abs=tolerance)


def test_accumulated_pretraining_makes_the_same_steps(data, tmp_path):
    whole = losses(data, tmp_path / "whole", SETTINGS, pretrain)
    parts = losses(data, tmp_path / "parts", SETTINGS.but(batch_size=4, accumulate=2), pretrain)
    # Every mask hides as many pixels, so the mean of two halves is the mean of the whole.
    assert parts == pytest.approx(whole, abs=1e-5)

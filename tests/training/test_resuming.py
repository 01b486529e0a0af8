"""A run that is interrupted, wherever, ends with the bits of one that is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import one_thread  # noqa: F401
from small_runs import EVERYTHING, assert_same_bits, class_folders, train, weights

from focalnet.training import pretrain
from focalnet.training.events import Events
from focalnet.training.saving import MANIFEST, checkpoints, why_not_whole

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
KILLED = ["in a file of weights", "before the optimizer", "before the name", "removing the oldest", "in training"]


class InterruptAt(Events):
    def __init__(self, step):
        self.at = step

    def step(self, done, total):
        if done == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Four steps of two epochs, with everything that has a state."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert train(data, folder, EVERYTHING)["steps"] == 4
    return folder


@pytest.mark.parametrize("step", [1, 2, 3, 4], ids=lambda step: f"step {step}")
def test_resumed_run_ends_with_the_same_bits(step, data, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", EVERYTHING, events=InterruptAt(step))
    summary = train(data, tmp_path / "run", EVERYTHING, resume=True)
    assert summary["resumed_from"] == (f"checkpoint-{step - 1}" if step > 1 else None)
    assert_same_bits(weights(tmp_path / "run"), weights(uninterrupted))
    expected = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["held_out_loss"] == expected["held_out_loss"]


def test_number_of_workers_does_not_change_the_bits(data, uninterrupted, tmp_path):
    train(data, tmp_path / "run", EVERYTHING.but(workers=2))
    assert_same_bits(weights(tmp_path / "run"), weights(uninterrupted))


def test_another_seed_gives_other_bits(data, uninterrupted, tmp_path):
    train(data, tmp_path / "run", EVERYTHING.but(seed=1))
    with pytest.raises(AssertionError):
        assert_same_bits(weights(tmp_path / "run"), weights(uninterrupted))


def test_resumed_pretraining_ends_with_the_same_bits(data, tmp_path):
    settings = EVERYTHING.but(mixup=0.0, cutmix=0.0)
    train(data, tmp_path / "whole", settings, task=pretrain)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", settings, task=pretrain, events=InterruptAt(3))
    train(data, tmp_path / "run", settings, task=pretrain, resume=True)
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """A folder for each way of being killed, with what was there after it and the resumed run's result."""
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, SCRIPT, data, root, *KILLED], check=True, timeout=280)
    return root


@pytest.mark.parametrize("moment", KILLED)
def test_killed_run_is_resumed_from_a_whole_checkpoint_to_the_same_bits(moment, killed, uninterrupted):
    facts = json.loads((killed / f"{moment}.json").read_text())
    assert facts["signal"] == 9
    assert facts["whole"], "the earlier checkpoint was lost"
    assert_same_bits(weights(killed / moment), weights(uninterrupted))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "ema.safetensors", MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "half"])
def test_half_written_checkpoint_is_never_taken(file, harm, uninterrupted, tmp_path):
    root = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    earlier, last = checkpoints(root)
    content = (last / file).read_bytes()
    (last / file).unlink()
    if harm == "half":
        (last / file).write_bytes(content[: len(content) // 2])
    assert why_not_whole(last) is not None
    assert checkpoints(root) == [earlier]


def test_resuming_with_other_settings_is_refused(data, uninterrupted):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.003, is 0\.1"):
        train(data, uninterrupted, EVERYTHING.but(learning_rate=0.1), resume=True)


def test_resuming_a_run_that_is_over_gives_its_result_again(data, uninterrupted, tmp_path):
    root = shutil.copytree(uninterrupted, tmp_path / "run")
    before = json.loads((root / "summary.json").read_text())
    for path in root.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    summary = train(data, root, EVERYTHING, resume=True)
    assert summary["held_out_loss"] == before["held_out_loss"]
    assert_same_bits(weights(root), weights(uninterrupted))


def test_time_limit_ends_with_a_checkpoint_that_goes_on(data, uninterrupted, tmp_path):
    summary = train(data, tmp_path / "run", EVERYTHING.but(max_minutes=1e-9))
    assert (summary["stopped"], summary["steps"]) == ("time", 1)
    assert train(data, tmp_path / "run", EVERYTHING, resume=True)["stopped"] == "end"
    assert_same_bits(weights(tmp_path / "run"), weights(uninterrupted))

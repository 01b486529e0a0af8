"""Two processes with half of each batch against one with all of it: the same losses, checkpoints of one format."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import one_thread  # noqa: F401
from small_runs import PLAIN, class_folders, train, weights

from focalnet.training.saving import checkpoints

SCRIPT = Path(__file__).parents[1] / "helpers" / "distributed_run.py"
SETTINGS = PLAIN.but(batch_size=16, ema=0.9, randaugment=2, crop_scale=(0.5, 1.0), flip=0.5, label_smoothing=0.1)


def losses(folder):
    last = checkpoints(folder / "checkpoints")[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = class_folders(root / "data", images=40)
    train(data, root / "one", SETTINGS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, data, root / "two", str(SETTINGS.batch_size // 2)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    return root


def test_losses_are_those_of_one_process(runs):
    one, two = losses(runs / "one"), losses(runs / "two")
    assert len(one) == len(two) == 8
    assert one == pytest.approx(two, abs=1e-4)


def test_what_is_written_is_the_same_in_format_and_close_in_value(runs):
    one, two = weights(runs / "one"), weights(runs / "two")
    assert {name: (x.shape, x.dtype) for name, x in one.items()} == {n: (x.shape, x.dtype) for n, x in two.items()}
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-5, name
    names = [sorted(path.name for path in (runs / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]


def test_the_held_out_images_are_counted_once(runs):
    summaries = [json.loads((runs / run / "summary.json").read_text()) for run in ("one", "two")]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["held_out"] == summaries[1]["held_out"] == 16
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert summaries[0]["batch"] == summaries[1]["batch"] == 16

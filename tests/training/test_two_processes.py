"""Two processes with half of each batch against one with all of it: the same losses, checkpoints of one format."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from command_line import offline_and_undone, run
from distributed_run import SETTINGS
from launched import launched, losses
from safetensors.torch import load_file
from small_models import one_thread  # noqa: F401
from small_runs import assert_same_bits, class_folders, train, weights

from focalnet.training.saving import checkpoints

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "helpers" / "distributed_run.py"
CONFIGURATIONS = files("focalnet.recipes") / "accelerate"
# Each runs on the configuration that comes with the package.
ENGINES = {"DDP": "one_machine.yaml", "FSDP2": "fsdp2.yaml"}
# torch shards on a CPU only where it was built without an accelerator.
SHARDS = torch.accelerator.current_accelerator() is None
SHARDED = pytest.mark.skipif(not SHARDS, reason="this torch shards on its accelerator only")
ENGINE = pytest.mark.parametrize("engine", ["DDP", pytest.param("FSDP2", marks=SHARDED)])


def launch(data, root, engine):
    """Start two processes as ``accelerate launch`` does for two GPUs; here they run on the CPU."""
    options = ["--config_file", CONFIGURATIONS / ENGINES[engine], "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, SCRIPT, data, root, engine]
    launched(command, GLOO_SOCKET_IFNAME="lo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = class_folders(root / "data", images=40)
    # An odd number of images, the last batch of which is not full, and one that nobody can read.
    class_folders(root / "val", images=7)
    (root / "val" / "red" / "04.png").write_bytes(b"not an image")
    train(data, root / "one", SETTINGS)
    train(data, root / "one bfloat16", SETTINGS.but(bf16=True))
    for engine in ENGINES if SHARDS else ("DDP",):
        launch(data, root, engine)
    return root


@ENGINE
def test_losses_are_those_of_one_process(engine, runs):
    one, two = losses(runs / "one"), losses(runs / engine)
    assert len(one) == len(two) == 8
    assert one == pytest.approx(two, abs=1e-4)


@ENGINE
def test_what_is_written_is_the_same_in_format_and_close_in_value(engine, runs):
    one, two = weights(runs / "one"), weights(runs / engine)
    assert {name: (x.shape, x.dtype) for name, x in one.items()} == {n: (x.shape, x.dtype) for n, x in two.items()}
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-5, name
    names = [sorted(path.name for path in (runs / run).iterdir()) for run in ("one", engine)]
    assert names[0] == names[1]
    assert (runs / "one" / "config.json").read_text() == (runs / engine / "config.json").read_text()


@ENGINE
def test_the_held_out_images_are_counted_once(engine, runs):
    summaries = [json.loads((runs / run / "summary.json").read_text()) for run in ("one", engine)]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["held_out"] == summaries[1]["held_out"] == 16
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert summaries[0]["batch"] == summaries[1]["batch"] == 16


@ENGINE
def test_stopped_run_is_resumed_to_the_same_bits(engine, runs):
    resumed = json.loads((runs / f"{engine} stopped" / "summary.json").read_text())
    assert (resumed["resumed_from"], resumed["steps"]) == ("checkpoint-1", 8)
    assert_same_bits(weights(runs / f"{engine} stopped"), weights(runs / engine))


@SHARDED
def test_shards_are_no_files(runs):
    """A checkpoint of FSDP2 holds whole tensors: its weights and their average have one process's names and shapes."""
    one, two = (checkpoints(runs / run / "checkpoints")[-1] for run in ("one", "FSDP2"))
    for file in ("model.safetensors", "ema.safetensors"):
        expected, actual = load_file(one / file), load_file(two / file)
        assert {name: x.shape for name, x in expected.items()} == {name: x.shape for name, x in actual.items()}


@SHARDED
def test_shards_compute_in_bfloat16_as_one_process_does(runs):
    one, two, exact = (losses(runs / name) for name in ("one bfloat16", "FSDP2 bfloat16", "one"))
    rounding = max(abs(a - b) for a, b in zip(one, exact, strict=True))
    assert rounding > 1e-5, "or nothing was computed in bfloat16"
    assert one == pytest.approx(two, abs=2 * rounding)
    assert two != pytest.approx(exact, abs=1e-5), "float32 agrees better than that"
    assert {x.dtype for x in weights(runs / "FSDP2 bfloat16").values()} == {torch.float32}


@SHARDED
def test_recomputed_blocks_drop_the_branches_that_they_dropped(runs):
    assert losses(runs / "recomputing") == losses(runs / "keeping")
    assert_same_bits(weights(runs / "recomputing"), weights(runs / "keeping"))


@pytest.fixture
def printed(runs):
    return [json.loads((runs / f"DDP {rank}.json").read_text()) for rank in (0, 1)]


def test_only_the_first_process_prints(printed, runs):
    first, second = printed
    assert second["finetune"] == second["evaluate"] == [0, "", ""]
    assert first["finetune"][0] == 0
    assert "training on 64 images of 2 classes" in first["finetune"][1]


def test_evaluation_of_two_processes_counts_what_one_does(printed, runs, monkeypatch):
    code, stdout, stderr = printed[0]["evaluate"]
    arguments = ["--model", runs / "DDP", "--batch-size=3", "--device=cpu", "--json"]
    with offline_and_undone(monkeypatch):
        alone = run("evaluate", runs / "val", *arguments)
    together, expected = json.loads(stdout), json.loads(alone.stdout)
    for facts in (together, expected):
        assert facts.pop("images_per_second") > 0
    assert together == expected
    assert (code, together["images"], together["images_this_run"], len(together["errors"])) == (1, 13, 13, 1)
    assert stderr == alone.stderr and stderr.count("04.png") == 1
    names = [line for file in ("record", "record.1") for line in (runs / file).read_text().splitlines()[1:]]
    assert len(names) == 13

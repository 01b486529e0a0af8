"""The work of one process of test_two_processes.py, which a launcher starts twice. Arguments: DATA ROOT FOLDER."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from command_line import run
from small_runs import CONFIG, PLAIN, train
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from focalnet.training import processes
from focalnet.training.trainer import FocalNetTrainer

# What works on gradients and weights that may lie in shards: clipping, rates by depth, the average.
SETTINGS = PLAIN.but(
    batch_size=16,
    ema=0.9,
    clip=0.5,
    layer_decay=0.8,
    randaugment=2,
    crop_scale=(0.5, 1.0),
    flip=0.5,
    label_smoothing=0.1,
)
HALF = SETTINGS.but(batch_size=8)
WITH_FSDP = "ACCELERATE_USE_FSDP" in os.environ


def check_shards():
    """Make every run assert, before it writes, that its parameters are shards if and only if FSDP2 was asked for."""
    original = FocalNetTrainer.whole_weights

    def whole_weights(trainer):
        assert {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()} == {WITH_FSDP}
        block = trainer.model.focalnet.encoder.stages[0].layers[0]
        assert isinstance(block, FSDPModule) == WITH_FSDP
        return original(trainer)

    FocalNetTrainer.whole_weights = whole_weights


def training(data, root, name):
    train(data, root / name, HALF)
    # One clock is enough to stop both.
    train(data, root / f"{name} stopped", HALF.but(max_minutes=1e-9 if os.environ["RANK"] == "1" else 60))
    train(data, root / f"{name} stopped", HALF, resume=True)


def with_shards_only(data, root):
    """In bfloat16; and with and without FSDP2's activation checkpointing, where branches are dropped at random."""
    train(data, root / "FSDP2 bfloat16", HALF.but(bf16=True))
    dropping = HALF.but(drop_path=0.5, epochs=1)
    train(data, root / "recomputing", dropping)
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "false"
    train(data, root / "keeping", dropping)


def commands(data, root, name):
    """What each process prints in a training run and in an evaluation."""
    # A command disconnects at its end, and processes cannot connect twice over one store.
    processes.leave = lambda: None
    small = [f"--set={field}={value}" for field, value in CONFIG.items()]
    small += ["--recipe=digits", "--image-size=16", "--batch-size=8", "--epochs=1", "--device=cpu"]
    evaluation = ["--model", root / name, "--batch-size=3", "--device=cpu", "--record", root / "record", "--json"]
    results = {
        "finetune": run("finetune", data, "--output", root / f"{name} command", *small),
        "evaluate": run("evaluate", root / "val", *evaluation),
    }
    facts = {command: [it.exit_code, it.stdout, it.stderr] for command, it in results.items()}
    Path(root, f"{name} {os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, root, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    check_shards()
    training(data, root, name)
    if WITH_FSDP:
        with_shards_only(data, root)
    else:
        commands(data, root, name)
    sys.stdout.flush()
    # Skips the interpreter's teardown, in which running threads of gloo may end the process with SIGABRT.
    os._exit(0)

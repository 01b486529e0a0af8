"""Runs that are killed with SIGKILL at a given moment and then resumed, for test_resuming.py.

    python killed_runs.py DATA ROOT MOMENT...

The process imports everything once and trains in forks. It starts no threads itself, so forking is safe.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

import matplotlib.backends.backend_agg  # noqa: E402, F401  (once, not in every fork)
import safetensors.torch  # noqa: E402
from small_runs import EVERYTHING, train  # noqa: E402

from focalnet.training import saving, trainer  # noqa: E402
from focalnet.training.events import Events  # noqa: E402

SAVE = 2  # the save that is interrupted


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(count, module, name, action):
    """Make the ``count``-th call of ``module.name`` run ``action`` first."""
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            action(*args)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def half_of_it(root):
    """An action that dies after writing half of the weights, as if killed in the middle."""

    def action(state_dict, path, *args):
        whole = safetensors.torch.save(state_dict)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(whole[: len(whole) // 2])
        die()

    return action


def removed_in_part(root):
    def action(path, *args):
        for file in sorted(Path(path).iterdir())[:3]:
            file.unlink()
        die()

    return action


class Die(Events):
    def step(self, done, total):
        if done == SAVE + 1:
            die()


def prepare(moment, folder):
    if moment == "in a file of weights":
        import transformers.modeling_utils as modeling

        name = "safe_save_file" if hasattr(modeling, "safe_save_file") else "save_file"
        on_call(SAVE, modeling, name, half_of_it(folder))
    elif moment == "before the optimizer":
        on_call(SAVE, trainer.FocalNetTrainer, "_save_optimizer_and_scheduler", lambda *_: die())
    elif moment == "before the name":
        on_call(SAVE, saving.os, "replace", lambda *_: None)
        original = trainer.publish

        def publish(staged, destination):
            if destination.name == f"checkpoint-{SAVE}":
                saving._flush = lambda path: die() if path.name == saving.MANIFEST else None
            original(staged, destination)

        trainer.publish = publish
    elif moment == "removing the oldest":
        original = trainer.keep_latest

        def keep_latest(root, count):
            if len(saving.checkpoints(root)) > count:
                on_call(1, saving.shutil, "rmtree", removed_in_part(folder))
            original(root, count)

        trainer.keep_latest = keep_latest
    return Die() if moment == "in training" else None


def in_fork(work):
    """Run ``work`` in a fork. Returns the signal that ended it, or its exit status, negated."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(data, root, *moments):
    for moment in moments:
        folder = Path(root) / moment
        ended = in_fork(lambda: train(data, folder, EVERYTHING, events=prepare(moment, folder)))  # noqa: B023
        whole = [path.name for path in saving.checkpoints(folder / "checkpoints")]
        facts = {"signal": ended, "whole": whole}
        resumed = in_fork(lambda: train(data, folder, EVERYTHING, resume=True))  # noqa: B023
        assert resumed == 0, moment
        Path(root, f"{moment}.json").write_text(json.dumps(facts))
        shutil.rmtree(folder / "checkpoints")


if __name__ == "__main__":
    main(*sys.argv[1:])

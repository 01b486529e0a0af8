"""Runs a command that starts processes of its own, and leaves none behind if it takes too long."""

import json
import os
import signal
import subprocess

from focalnet.training.saving import checkpoints


def launched(command, **environment):
    """The output of ``command``, which has to end well within four minutes."""
    process = subprocess.Popen(
        list(map(str, command)),
        # The tests' processes are for the CPU, wherever they run.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # torchrun ends its workers when it is asked to end; they have sessions of their own.
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise
    assert process.returncode == 0, output[-4000:]
    return output


def losses(folder):
    """The losses that a run logged."""
    last = checkpoints(folder / "checkpoints")[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]

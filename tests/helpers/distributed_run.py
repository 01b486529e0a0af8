"""One process of test_two_processes.py, started as torchrun would. Arguments: DATA OUTPUT BATCH_SIZE."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from small_runs import PLAIN, train

SETTINGS = PLAIN.but(ema=0.9, randaugment=2, crop_scale=(0.5, 1.0), flip=0.5, label_smoothing=0.1)

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], sys.argv[2], SETTINGS.but(batch_size=int(sys.argv[3])))
    sys.stdout.flush()
    # Skips the interpreter's teardown, in which running threads of gloo may end the process with SIGABRT.
    os._exit(0)

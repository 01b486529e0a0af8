"""One runtime in a process of its own: reads "run" from standard input, runs once, writes the seconds it took.

    python bench/worker.py RUNTIME VARIANT SIZE BATCH [train]

A process each, because thread pools in one process slow each other down. The first line written is "ready", or
"absent" and the reason; after "end" comes the peak memory in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings

import torch
from runtimes import RUNTIMES, Case

INPUTS = 4  # taken in turn, so that no run finds its images in the cache
WARM_UP = 3


def main() -> None:
    name, variant, size, batch, *rest = sys.argv[1:]
    warnings.simplefilter("ignore")
    case = Case(variant, int(size), int(batch), training="train" in rest)
    try:
        run = RUNTIMES[name](case)
    except ModuleNotFoundError as error:
        say("absent", f"{error.name} is not installed")
        return
    images = [case.images(seed) for seed in range(INPUTS)]
    for index in range(WARM_UP):
        run(images[index % INPUTS])
    say("ready", torch.get_num_threads())
    for count, line in enumerate(sys.stdin):
        if line.strip() != "run":
            break
        start = time.perf_counter()
        run(images[count % INPUTS])
        say("seconds", time.perf_counter() - start)
    say("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def say(what: str, value: object) -> None:
    print(json.dumps([what, value]), file=OUT, flush=True)


if __name__ == "__main__":
    # Libraries print what they like; the answers have a channel of their own.
    OUT, sys.stdout = sys.stdout, sys.stderr
    main()

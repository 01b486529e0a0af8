"""The worker process of one runtime. For each "run" on standard input it runs once and writes the seconds it took.

    python -m focalnet.benchmark.worker RUNTIME CASE        (CASE: the fields of `Case` as JSON)

The first line of output is "ready", or "absent" and the reason (a missing library, or the runtime's exception). After
"end" the worker writes the peak memory in bytes: that of the process on a CPU, that of torch's tensors on a GPU. On a
CPU it also writes how much of it came after libraries and images were loaded: the model's weights, and what building
and running them took.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import IO, Any

import torch

from .architectures import ARCHITECTURES
from .memory import Peak
from .runtimes import RUNTIMES, Case, load_libraries

# The inputs take turns, so that no run finds its images in the cache.
INPUTS = 4
# The warm-up ends after this many runs or seconds, whichever comes first.
WARM_UP_RUNS, WARM_UP_S = 3, 2.0


def main(out: IO[str]) -> None:
    name, fields = sys.argv[1:]
    warnings.simplefilter("ignore")
    case = Case(**json.loads(fields))
    images = [case.images(seed) for seed in range(INPUTS)]
    start = (RUNTIMES | ARCHITECTURES)[name]
    try:
        load_libraries(name, start, case)
        peak = Peak()
        run = start(case)
        warm_up(run, images)
    except ModuleNotFoundError as error:
        say(out, "absent", f"{error.name} is not installed")
        return
    except Exception as error:
        # A runtime that cannot compile or run the case is left out, with its exception as the reason.
        say(out, "absent", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        traceback.print_exc()
        return
    say(out, "ready", torch.get_num_threads())
    for count, line in enumerate(sys.stdin):
        if line.strip() != "run":
            break
        say(out, "seconds", seconds_of(run, images[count % INPUTS]))
    say(out, "peak", [peak.of_process(), peak.since()] if case.device == "cpu" else [gpu_peak(), None])


def warm_up(run: Callable[..., Any], images: list[torch.Tensor]) -> None:
    """Run a few times for up to `WARM_UP_S`. The first run compiles and does not count towards that time."""
    run(images[0])
    start = time.perf_counter()
    for index in range(1, WARM_UP_RUNS):
        if time.perf_counter() - start < WARM_UP_S:
            run(images[index % INPUTS])


def seconds_of(run: Callable[..., Any], image: torch.Tensor) -> float:
    synchronize(image)
    start = time.perf_counter()
    run(image)
    synchronize(image)
    return time.perf_counter() - start


def synchronize(image: torch.Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


def gpu_peak() -> int:
    return torch.cuda.max_memory_allocated()


def say(out: IO[str], what: str, value: object) -> None:
    print(json.dumps([what, value]), file=out, flush=True)


if __name__ == "__main__":
    # Libraries may print to stdout, so redirect it to stderr and keep the original for the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    main(answers)

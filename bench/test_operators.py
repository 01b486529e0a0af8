"""Times the operator with pytest-benchmark, for work on a kernel: `pytest bench/ --benchmark-only`.

Use `--benchmark-save=before` before a change, then `--benchmark-compare=0001 --benchmark-group-by=func,param:stage`
after it. On a GPU the time includes a synchronisation, which hides differences of a few microseconds.
bench/gpu/gpu_kernels.py does not synchronise after each call.
"""

import pytest
import torch

from focalnet.benchmark import operators
from focalnet.benchmark.runtimes import Case

CASE = Case("tiny_lrf", 224, 8, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", operators.able_backends(CASE.device))
@pytest.mark.parametrize("direction", operators.DIRECTIONS)
@pytest.mark.parametrize("stage", operators.stages(CASE), ids=lambda stage: stage.name.replace(" ", ""))
def test_focal_modulation(benchmark, stage, direction, backend):
    call = operators.DIRECTIONS[direction](stage, CASE, backend)

    def run():
        call(0)
        if CASE.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)

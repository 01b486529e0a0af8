"""What launches that nobody compiled here take by the performance model: around the aggregation of the backend `cuda`,
and of the reference.

A launch takes the longest of its bytes over the bandwidth, its float32 multiply-adds over their rate, and its product
over the tensor cores' rate, and `GAP` until the next. No launch can be faster; cuDNN's and cuBLAS's are slower. So the
figure for the reference under torch.compile is the least that it can take, not a guess of what it takes. Inductor's
kernels were not compiled, since inductor wants a device. What they are is inferred: convolutions and products stay
launches of their own, everything between two of them is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from processors import GAP, Processor

from focalnet.benchmark.floors import ERF_OPERATIONS, Stage

CUDA_LANES = 32


@dataclass(frozen=True)
class TorchLaunch:
    """``planes``: maps of all channels that are read and written; ``fma``, ``matrix``: multiply-adds of an element."""

    planes: float
    fma: float = 0.0
    matrix: float = 0.0


def seconds(
    launches: Sequence[TorchLaunch], stage: Stage, batch: int, dtype: torch.dtype, processor: Processor
) -> float:
    """Of the launches, one after another."""
    elements = batch * stage.height * stage.width * stage.channels
    fma_rate = CUDA_LANES * processor.fma * processor.device.sm_count * processor.clock
    matrix_rate = processor.tensor * processor.device.sm_count * processor.clock if dtype.itemsize == 2 else fma_rate
    return sum(
        GAP
        + elements
        * max(one.planes * dtype.itemsize / processor.bandwidth, one.fma / fma_rate, one.matrix / matrix_rate)
        for one in launches
    )


def product(stage: Stage) -> TorchLaunch:
    """Rows of channels times a (C, C) matrix."""
    return TorchLaunch(2, matrix=stage.channels)


def around_aggregation(operator: str, stage: Stage) -> list[TorchLaunch]:
    """What composed.py launches beside the aggregation: products of matrices by cuBLAS, the rest by modulate.cu."""
    if operator == "focal_modulation":
        return [product(stage), TorchLaunch(3)]
    if operator == "focal_modulation_bwd":
        # dmodulator with partial sums of it, and their sum; dagg; the modulator again, times dout; dweight
        return [TorchLaunch(3), TorchLaunch(0), product(stage), product(stage), TorchLaunch(3), product(stage)]
    return []


def compiled_reference(operator: str, stage: Stage) -> list[TorchLaunch]:
    """The reference under torch.compile. Its forward keeps every level for its backward."""
    taps = [stage.multiply_adds_of(level) for level in range(stage.levels)]
    convolutions = [TorchLaunch(2, fma=count) for count in taps]
    if not operator.endswith("_bwd"):
        # GELU between two convolutions; the mean of the last level; all levels times their gates.
        between = [TorchLaunch(2, fma=ERF_OPERATIONS)] * (stage.levels - 1)
        ends = [TorchLaunch(1, fma=ERF_OPERATIONS), TorchLaunch(stage.levels + 1, fma=stage.levels + ERF_OPERATIONS)]
        launches = [*convolutions, *between, *ends]
    else:
        # Of each level: dz and dgates from dagg, z and what comes from the level above; both gradients of the
        # convolution. The last level has none above. One launch sums for the global level.
        slopes = [TorchLaunch(4, fma=2 * ERF_OPERATIONS)] * (stage.levels - 1)
        slopes += [TorchLaunch(3, fma=2 * ERF_OPERATIONS), TorchLaunch(1)]
        launches = [*slopes, *convolutions, *convolutions]
    if operator == "focal_modulation":
        return [*launches, product(stage), TorchLaunch(3)]
    if operator == "focal_modulation_bwd":
        # dmodulator and dq in one launch, dbias, dagg, dweight.
        return [*launches, TorchLaunch(5), TorchLaunch(1), product(stage), product(stage)]
    return launches

"""Times `focal_modulation` with each backend that runs here, at the sizes of a published model's stages."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.registry import backends
from ..functional import focal_modulation
from ..operators.norm_linear import padded_empty
from ..variants import VARIANTS
from .runtimes import Case
from .timing import measure, ratio


@dataclass(frozen=True)
class Stage:
    """The operator's sizes in one stage of a model."""

    batch: int
    height: int
    width: int
    channels: int
    kernels: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.height} x {self.width} x {self.channels}"


def stages(case: Case) -> list[Stage]:
    variant = VARIANTS[case.variant]
    kernels = tuple(variant.window + 2 * level for level in range(variant.levels))
    found = []
    for stage in range(len(variant.depths)):
        side = math.ceil(case.size / (variant.patch_size * 2**stage))
        found.append(Stage(case.batch, side, side, variant.embed_dim * 2**stage, kernels))
    return found


def able_backends(device: str) -> list[str]:
    """The backends that run on a device, "cpu" or "cuda"; the reference last."""
    wanted = ("cpu", "reference") if device == "cpu" else ("triton", "cuda", "reference")
    return [name for name in wanted if backends()[name] is None]


def compare(case: Case, rounds: int, on_step: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
    """Yield a row for each stage, direction and backend. ``on_step`` is called after each round of each of them."""
    for stage in stages(case):
        for direction, make in DIRECTIONS.items():
            calls = {name: make(stage, case, name) for name in able_backends(case.device)}
            timings = measure(calls, case.device, rounds, on_step)
            base = next(iter(timings))
            for name, timing in timings.items():
                yield {
                    "case": direction,
                    "operator": "focal_modulation",
                    "variant": case.variant,
                    "stage": stage.name,
                    "kernels": list(stage.kernels),
                    "batch": stage.batch,
                    "dtype": case.dtype,
                    "backend": name,
                    **timing.row(),
                    "ratio_to": base,
                    **ratio(timing.seconds, timings[base].seconds),
                }


def steps(case: Case, rounds: int) -> int:
    """The number of times `compare` calls ``on_step``."""
    return len(stages(case)) * len(DIRECTIONS) * len(able_backends(case.device)) * rounds


def operands(stage: Stage, case: Case) -> tuple[Any, ...]:
    """The packed projection, the sizes that it is split into, the focal weights, and the weight of the product.

    On a GPU the rows of the projection are padded, as those of a model are.
    """
    generator = torch.Generator().manual_seed(0)
    channels, gates = stage.channels, len(stage.kernels) + 1

    def normal(*shape: int) -> torch.Tensor:
        return case.placed(torch.randn(*shape, generator=generator))

    projected = normal(stage.batch, stage.height, stage.width, 2 * channels + gates)
    if projected.is_cuda:
        projected = padded_empty(projected, projected.shape).copy_(projected)
    focal_weights = [normal(channels, 1, k, k) / k for k in stage.kernels]
    return projected, (channels, channels, gates), focal_weights, normal(channels, channels) / math.sqrt(channels)


def forward(stage: Stage, case: Case, backend: str) -> Callable[[int], object]:
    projected, sizes, focal_weights, weight = operands(stage, case)
    run = functools.partial(focal_modulation, *projected.split(sizes, -1), focal_weights, weight, backend=backend)
    return torch.inference_mode()(lambda number: run())


def forward_and_backward(stage: Stage, case: Case, backend: str) -> Callable[[int], object]:
    projected, sizes, focal_weights, weight = operands(stage, case)
    leaves = [tensor.requires_grad_() for tensor in (projected, *focal_weights, weight)]
    dout = torch.ones_like(projected[..., : stage.channels])

    def run(number: int) -> object:
        out = focal_modulation(*projected.split(sizes, -1), focal_weights, weight, backend=backend)
        return torch.autograd.grad(out, leaves, dout)

    return run


DIRECTIONS = {"forward": forward, "forward and backward": forward_and_backward}

"""Lower bounds of the cost of focal modulation: bytes, arithmetic, and the time a GPU needs for the slower of them.

`Stage` holds the sizes of one stage, `Work` the bytes and operations that an operator needs at least, `Gpu` the peak
rates of a device. No kernel can be faster than ``work.seconds(gpu, dtype)``, and tables show it beside every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from focalnet.variants import VARIANTS, Variant

OPERATORS = ("gated_aggregation", "gated_aggregation_bwd", "focal_modulation", "focal_modulation_bwd")


@dataclass(frozen=True)
class Stage:
    """The map, channels and kernel sizes that the blocks of one stage share."""

    variant: str
    index: int
    height: int
    width: int
    channels: int
    kernels: tuple[int, ...]

    @property
    def levels(self) -> int:
        return len(self.kernels)

    @property
    def taps(self) -> int:
        """Number of kernel weights per channel, over all levels."""
        return sum(k * k for k in self.kernels)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all convolutions for one channel of one map, without those on zero padding."""
        return sum(_overlaps(self.height, k) * _overlaps(self.width, k) for k in self.kernels)

    def multiply_adds_of(self, level: int) -> float:
        """Multiply-adds of one level's convolution for an element of a map, on average."""
        kernel = self.kernels[level]
        return _overlaps(self.height, kernel) * _overlaps(self.width, kernel) / (self.height * self.width)

    def __str__(self) -> str:
        return f"{self.variant} stage {self.index + 1}: {self.height}x{self.width}x{self.channels}, {self.kernels}"


def stages(name: str, image_size: tuple[int, int] | None = None, window: int | None = None) -> list[Stage]:
    """The stages of a published variant, at its own image size or another (height, width)."""
    variant = VARIANTS[name]
    height, width = image_size or (variant.image_size, variant.image_size)
    kernels = tuple((window or variant.window) + 2 * level for level in range(variant.levels))
    found = []
    for index in range(len(variant.depths)):
        stride = variant.patch_size * 2**index
        # Patches are padded (stem and downsampling both), so sizes round up.
        size = (-(-height // stride), -(-width // stride))
        found.append(Stage(name, index, *size, _channels(variant, index), kernels))
    return found


def _channels(variant: Variant, stage: int) -> int:
    return variant.embed_dim * 2**stage


def _overlaps(size: int, kernel: int) -> int:
    """The number of (position, tap) pairs along one axis for which the tap lies inside the map."""
    reach = kernel // 2
    return sum(min(size, position + reach + 1) - max(0, position - reach) for position in range(size))


# Multiply-adds, products and sums of float32 that the kernels spend on a GELU, or on its derivative: they evaluate a
# polynomial, and no special function unit.
ERF_OPERATIONS = 15


@dataclass(frozen=True)
class Work:
    """The minimal work of one call: bytes read and written once, float32 multiply-adds, erf or exp, matrix products.

    ``matrix`` counts multiply-adds.
    """

    bytes: int
    fma: int
    erf: int
    matrix: int

    def floors(self, gpu: Gpu, dtype: torch.dtype) -> dict[str, float]:
        """Seconds that each unit of the GPU needs at its peak rate."""
        return {
            "memory": self.bytes / gpu.bandwidth,
            "fma": 2 * (self.fma + ERF_OPERATIONS * self.erf) / gpu.fp32,
            "matrix": 2 * self.matrix / (gpu.fp32 if dtype == torch.float32 else gpu.tensor16),
        }

    def seconds(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """The floor in seconds. Units may work in parallel, so only the slowest counts."""
        return max(self.floors(gpu, dtype).values())


def work(operator: str, stage: Stage, batch: int, dtype: torch.dtype) -> Work:
    """The work of one call; backward computes every gradient.

    Backward recomputes the levels, because only the packed projection is saved. It needs the taps three times (levels,
    gradients of their inputs, gradients of their weights), erf and exp for GELU and its derivative, and three matrix
    products where forward has one.
    """
    positions, channels = batch * stage.height * stage.width, stage.channels
    plane, gates = positions * channels, positions * (stage.levels + 1)
    focal_weights, weight = stage.taps * channels, channels * channels + channels
    elements = {
        "gated_aggregation": 2 * plane + gates + focal_weights,
        "gated_aggregation_bwd": 3 * plane + 2 * gates + 2 * focal_weights,
        "focal_modulation": 3 * plane + gates + focal_weights + weight,
        "focal_modulation_bwd": 5 * plane + 2 * gates + 2 * focal_weights + 2 * weight,
    }[operator]
    gating = plane * (stage.levels + 1)
    backward, product = operator.endswith("_bwd"), operator.startswith("focal_modulation")
    passes = 3 if backward else 1
    return Work(
        bytes=elements * dtype.itemsize,
        fma=(batch * channels * stage.multiply_adds + gating) * passes,
        erf=plane * stage.levels * (2 if backward else 1),
        matrix=plane * channels * passes if product else 0,
    )


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU in bytes and operations per second, for dense matrices. A multiply-add is two operations.

    ``special`` is the rate of the special function units (16 operations per clock and multiprocessor).
    """

    name: str
    bandwidth: float
    fp32: float
    tensor16: float
    special: float
    l2: int
    multiprocessors: int
    arch: int


# From NVIDIA's data sheets and architecture white papers (A100: GA100; H100, H200: GH100 SXM; L40S: AD102).
GPUS = (
    Gpu("NVIDIA A100-SXM4-80GB", 2.039e12, 19.5e12, 312e12, 16 * 108 * 1.41e9, 40 << 20, 108, 80),
    Gpu("NVIDIA H100 80GB HBM3", 3.35e12, 66.9e12, 989e12, 16 * 132 * 1.98e9, 50 << 20, 132, 90),
    Gpu("NVIDIA H200", 4.8e12, 66.9e12, 989e12, 16 * 132 * 1.98e9, 50 << 20, 132, 90),
    Gpu("NVIDIA L40S", 0.864e12, 91.6e12, 362e12, 16 * 142 * 2.52e9, 96 << 20, 142, 89),
)
H100 = GPUS[1]


def gpu_named(name: str) -> Gpu | None:
    """The peak rates of a device, by its name from torch.cuda.get_device_name(), or None if it is not in the table."""
    return next((gpu for gpu in GPUS if gpu.name == name), None)

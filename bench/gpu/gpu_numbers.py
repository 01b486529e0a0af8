"""The numbers of every backend at the sizes of real stages, against the reference in float64.

    python bench/gpu/gpu_numbers.py [--device cpu]

Forward and every gradient of focal_modulation. The rule is that of the tests: an error is at most twice that of the
reference in the same precision, plus one unit in the last place of the largest value. A row for each backend, size and
dtype in bench/results/<device>/numbers.json, written as soon as it is known; exit code 1 if one breaks the rule.
"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

import focalnet
from focalnet.benchmark.environment import facts
from focalnet.benchmark.operators import able_backends
from focalnet.benchmark.rows import write

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """A map and its kernels."""

    batch: int
    height: int
    width: int
    channels: int
    kernels: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}x{self.channels}, {' '.join(map(str, self.kernels))}"


# The stages of FocalNet-T at 224 pixels; of FocalNet-L (fl3) at 384 the first.
SHAPES = (
    Shape(2, 56, 56, 96, (3, 5, 7)),
    Shape(2, 28, 28, 192, (3, 5, 7)),
    Shape(2, 14, 14, 384, (3, 5, 7)),
    Shape(2, 7, 7, 768, (3, 5, 7)),
    Shape(1, 96, 96, 192, (5, 7, 9)),
)
# To try the script on a CPU.
SMALL, CPU_DTYPES = (Shape(1, 8, 8, 16, (3, 5)),), (torch.bfloat16, torch.float32)


def operands(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """packed projection, weight, bias, dout and the focal weights: numbers that ``dtype`` can hold, in float64."""
    generator = torch.Generator().manual_seed(0)
    channels, features = shape.channels, 2 * shape.channels + len(shape.kernels) + 1

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype).double().to(device)

    image = (shape.batch, shape.height, shape.width)
    focal_weights = [normal(channels, 1, k, k, scale=1 / k) for k in shape.kernels]
    weight = normal(channels, channels, scale=channels**-0.5)
    return [normal(*image, features), weight, normal(channels), normal(*image, channels), *focal_weights]


def results(given: list[Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """out and the gradients, by name."""
    packed, weight, bias, dout, *focal_weights = (tensor.detach().to(dtype) for tensor in given)
    leaves = {"projection": packed, "weight": weight, "bias": bias}
    leaves |= {f"focal weight {level}": tensor for level, tensor in enumerate(focal_weights)}
    for tensor in leaves.values():
        tensor.requires_grad_()
    channels, gates = weight.shape[0], packed.shape[-1] - 2 * weight.shape[0]
    q, ctx, gates = packed.split([channels, channels, gates], dim=-1)
    out = focalnet.focal_modulation(q, ctx, gates, focal_weights, weight, bias, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@functools.lru_cache(maxsize=1)
def references(shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the reference, in float64 and in ``dtype``: computed on the device, returned on the CPU.

    Without cuDNN, which would choose kernels for seconds, and round float32 to TF32.
    """
    given = operands(shape, dtype, device)
    with torch.backends.cudnn.flags(enabled=False):
        exact, rounded = (results(given, one, "reference") for one in (torch.float64, dtype))
    return tuple({name: tensor.cpu() for name, tensor in found.items()} for found in (exact, rounded))


def compared(shape: Shape, dtype: torch.dtype, backend: str, device: str) -> dict[str, object]:
    """The row: for each tensor the error over what the rule allows."""
    exact, rounded = references(shape, dtype, device)
    mine = {name: tensor.cpu() for name, tensor in results(operands(shape, dtype, device), dtype, backend).items()}
    shares = {}
    for name, wanted in exact.items():
        ulp = torch.finfo(dtype).eps * 2 ** wanted.abs().max().log2().floor()
        allowed = 2 * (rounded[name] - wanted).abs().max() + ulp
        shares[name] = float((mine[name] - wanted).abs().max() / allowed)
    row = {"case": "numbers", "operator": "focal_modulation", "subject": str(shape), "backend": backend}
    # Not a number is no number below 1.
    return row | {"dtype": str(dtype).removeprefix("torch."), "error_over_allowed": shares, "obeys": _obeys(shares)}


def _obeys(shares: dict[str, float]) -> bool:
    return all(share <= 1 for share in shares.values())


def main(device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda") -> None:
    """Compare, print a line for each row, and write the rows."""
    environment, wrong = facts(device), 0
    names = [name for name in able_backends(device) if name != "reference"]
    shapes, dtypes = (SHAPES, DTYPES) if device == "cuda" else (SMALL, CPU_DTYPES)
    for shape, dtype, backend in itertools.product(shapes, dtypes, names):
        wrong += not _one(shape, dtype, backend, device, environment)
    raise typer.Exit(int(wrong > 0 or not names))


def _one(shape: Shape, dtype: torch.dtype, backend: str, device: str, environment: dict[str, object]) -> bool:
    """Whether the numbers are right. A call that fails is reported like wrong numbers: the others still run."""
    start = time.monotonic()
    try:
        row = compared(shape, dtype, backend, device)
    except Exception as error:
        row = {"case": "numbers", "operator": "focal_modulation", "subject": str(shape), "backend": backend}
        row |= {"dtype": str(dtype).removeprefix("torch."), "obeys": False}
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    shares = row.get("error_over_allowed", {})
    worst = max(shares, key=lambda name: shares[name], default=None)
    shown = row.get("failed") or f"{shares[worst]:.2f} of what is allowed ({worst})"
    verdict, seconds = "ok   " if row["obeys"] else "WRONG", time.monotonic() - start
    print(f"{verdict} {backend}, {row['dtype']}, {shape}: {shown}, {seconds:.1f} s", flush=True)
    if device == "cuda":
        write([row | environment], "numbers", str(environment["device"]))
    return bool(row["obeys"])


if __name__ == "__main__":
    typer.run(main)

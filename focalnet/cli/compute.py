"""The options --device, --dtype and --backend, which several commands share, and their conversion to torch's types."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Backend = Annotated[str | None, typer.Option(help="triton, cuda, cpu or reference; chosen automatically by default.")]
OnDevice = Annotated[Device, typer.Option(help="auto uses a GPU if there is one.")]
InDType = Annotated[DType, typer.Option(help="auto: bfloat16 where the hardware computes in it.")]


def device_for(device: Device, backend: str | None) -> torch.device:
    """The device to run on. Raises UserError if the device is missing or the backend cannot run."""
    import torch

    from ..backends.registry import backends

    known = backends()
    if backend is not None and backend not in known:
        raise UserError(f"--backend: expected one of {', '.join(known)}, got {backend}")
    if backend is not None and known[backend] is not None:
        raise UserError(f"--backend {backend} cannot run here: {known[backend]}")
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here (see `focalnet info`); use --device cpu")
    if device is Device.auto:
        # The kernels for one device do not run on the other.
        on_cpu = backend == "cpu" or not torch.cuda.is_available()
        return torch.device("cpu" if on_cpu else "cuda")
    return torch.device(device.value)


def torch_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """The dtype to compute in. ``auto`` is bfloat16 where ``device`` has arithmetic for it; the choice is printed."""
    import torch

    if dtype is not DType.auto:
        return getattr(torch, dtype.value)
    chosen = torch.bfloat16 if _has_bfloat16(device) else torch.float32
    typer.echo(f"--dtype auto: computing in {str(chosen).removeprefix('torch.')} on {device}", err=True)
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    from ..backends import extension

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return extension.missing() is None and torch.ops.focalnet.cpu_isa() in ("avx512_bf16", "amx")


def backend_for(name: str | None) -> AbstractContextManager[Any]:
    from .. import use_backend

    return nullcontext() if name is None else use_backend(name)

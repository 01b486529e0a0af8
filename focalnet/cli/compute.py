"""The options --device, --dtype and --backend that commands share, and their conversion to torch's objects."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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


def torch_dtype(dtype: DType) -> torch.dtype:
    import torch

    return getattr(torch, dtype.value)


def backend_for(name: str | None) -> AbstractContextManager[Any]:
    from .. import use_backend

    return nullcontext() if name is None else use_backend(name)

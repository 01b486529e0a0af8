"""Goes around convolutions of oneDNN that never return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """``F.conv2d``, in float32 where oneDNN might never return; the result has the dtype that it would have had."""
    dtype = _computed_in(x)
    if not may_hang(x.device, dtype, weight.shape[-1]):
        return F.conv2d(x, weight, bias, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return F.conv2d(x.float(), weight.float(), bias, *args, **kwargs).to(dtype)


def may_hang(device: torch.device, dtype: torch.dtype, kernel_width: int) -> bool:
    """Whether a depthwise convolution could reach oneDNN's kernel `brdgmm_dw` with a 16-bit type and a wide kernel.

    On processors with AVX512_BF16 its forward then loops forever, on maps and for numbers of channels that depend on
    the number of threads: seen in bfloat16 from a width of 15 on, with oneDNN 3.12 as in torch 2.13; no issue
    upstream is known. It takes channels-last tensors, and compilers choose that layout by themselves, so a layout is
    no way out. Where there is AVX512_FP16 the same code takes float16. All accumulate in float32 anyway.
    """
    return device.type == "cpu" and dtype.itemsize == 2 and kernel_width >= 15


def _computed_in(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


class _Guarded(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        return (conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def guarded(x: Tensor, kernel_width: int) -> contextlib.AbstractContextManager[Any]:
    """Inside it, modules that are called on maps like ``x`` run `conv2d` of this file."""
    if isinstance(x, torch.fx.Proxy) or not may_hang(x.device, _computed_in(x), kernel_width):
        return contextlib.nullcontext()
    return _Guarded()

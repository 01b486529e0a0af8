"""Works around a oneDNN bug: some 16-bit depthwise convolutions on a CPU never return. They run in float32 here."""

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
    """``F.conv2d`` with the same shapes and dtype of the result, computed in float32 if oneDNN might hang."""
    dtype = _computed_in(x)
    if not may_hang(x.device, dtype, weight.shape[-1]):
        return F.conv2d(x, weight, bias, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return F.conv2d(x.float(), weight.float(), bias, *args, **kwargs).to(dtype)


def may_hang(device: torch.device, dtype: torch.dtype, kernel_width: int) -> bool:
    """Whether a depthwise convolution could reach oneDNN's kernel `brdgmm_dw` with a 16-bit type and a wide kernel.

    On processors with AVX512_BF16 the forward of that kernel can loop forever. The affected map sizes and numbers of
    channels depend on the number of threads. This was seen in bfloat16 from a kernel width of 15 up, with oneDNN 3.12
    (torch 2.13); no upstream issue is known. The kernel handles channels-last tensors. Choosing another layout does
    not help, because compilers choose channels-last on their own. With AVX512_FP16 the same code handles float16. The
    fallback to float32 loses no accuracy: the 16-bit kernels accumulate in float32 too.
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
    """A context in which every ``torch.conv2d`` is `conv2d` of this file, for modules called on maps like ``x``.

    It does nothing if oneDNN cannot hang on ``x`` with kernels of this width.
    """
    if isinstance(x, torch.fx.Proxy) or not may_hang(x.device, _computed_in(x), kernel_width):
        return contextlib.nullcontext()
    return _Guarded()

"""The two operators as functions. Arguments are checked here, before any kernel runs.

Each kind of call is checked once. `operators.eager` remembers the kinds of calls that passed, and later calls of the
same kind skip the checks and the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends.registry import requested
from .operators import eager
from .operators import focal_modulation as _ops  # noqa: F401  (registers the operators)
from .operators.autocast import autocast_dtype
from .operators.exporting import is_exporting


def focal_modulation(
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalize_modulator: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Focal modulation of a query by gated context of growing range.

    Yang et al., "Focal Modulation Networks", NeurIPS 2022 (arXiv:2203.11926), section 3.2. With
    ``agg = gated_aggregation(ctx, gates, focal_weights)`` it equals ``q * F.linear(agg, weight, bias)``.

    Args:
        q: query, ``(B, H, W, C)``. Views with any strides are accepted and not copied.
        ctx: context before the first level, ``(B, H, W, C)``.
        gates: one gate per position and level, the last for the global level, ``(B, H, W, L + 1)``.
        focal_weights: L depthwise kernels, each ``(C, 1, k, k)`` or ``(C, 1, kh, kw)`` with odd sizes, from the first
            level to the last. Convolutions are zero-padded to keep H and W; the activation is the exact (erf) GELU.
        weight: 1x1 convolution that makes the modulator, ``(C, C)`` or ``(C, C, 1, 1)``.
        bias: ``(C,)`` or None.
        normalize_modulator: divide the aggregated context by L + 1.
        backend: "triton", "cuda", "cpu" or "reference"; None selects the first that can run the call.

    Returns:
        ``(B, H, W, C)``, contiguous, with the dtype of ``q``. Under autocast, with autocast's dtype.

    All tensors share one floating-point dtype (except under autocast, which casts) and one device. B may be 0.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or its dtype differs from that of ``q``.
        ValueError: a shape or device does not match, or no backend has the given name.
        RuntimeError: the requested backend cannot run this call; the message says why.
    """
    given = (q, ctx, gates, weight) if bias is None else (q, ctx, gates, weight, bias)
    key = eager.key("focal_modulation", given, focal_weights, backend)
    if (run := eager.known(key)) is not None:
        matrix = weight if weight.ndim == 2 else weight.flatten(1)
        return run(q, ctx, gates, focal_weights, matrix, bias, normalize_modulator)
    q, ctx, gates, focal_weights, weight, bias = _checked(q, ctx, gates, focal_weights, weight, bias)
    if _must_be_plain(backend):
        return reference.focal_modulation(q, ctx, gates, focal_weights, weight, bias, normalize_modulator)
    if key is not None:
        eager.remember(key, "focal_modulation", ctx, focal_weights, backend)
    return torch.ops.focalnet.focal_modulation(
        q, ctx, gates, focal_weights, weight, bias, normalize_modulator, backend
    )


def packed_focal_modulation(
    projected: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    *,
    normalize_modulator: bool,
    backend: str | None,
) -> Tensor:
    """`focal_modulation` of the parts of ``projected`` (B, H, W, 2C + L + 1), whose gradient is one tensor.

    For modules, which know that nothing but a compiler observes the call (`fusion.norm_branches.may_pad`).
    """
    channels = weight.shape[0]
    q, ctx, gates = projected.split([channels, channels, len(focal_weights) + 1], dim=-1)
    _, ctx, _, focal_weights, weight, bias = _checked(q, ctx, gates, focal_weights, weight, bias)
    projected = projected.to(ctx.dtype)
    return torch.ops.focalnet.packed_focal_modulation(
        projected, focal_weights, weight, bias, normalize_modulator, backend
    )


def gated_aggregation(
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    *,
    normalize_modulator: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Hierarchical contextualisation and gated aggregation: the context part of `focal_modulation`.

    Yang et al. (arXiv:2203.11926), section 3.2, equations 4 to 6: with ``ctx_0 = ctx`` and
    ``ctx_{l+1} = GELU(depthwise_conv(ctx_l, focal_weights[l]))``, returns ``sum_l gates[..., l] * ctx_{l+1}`` over the
    L levels, plus ``gates[..., L] * GELU(mean over H, W of ctx_L)``.

    Args, dtypes, devices and errors are those of `focal_modulation`.

    Returns:
        ``(B, H, W, C)``, contiguous, with the dtype of ``ctx``.
    """
    key = eager.key("gated_aggregation", (ctx, gates), focal_weights, backend)
    if (run := eager.known(key)) is not None:
        return run(ctx, gates, focal_weights, normalize_modulator)
    tensors = {"ctx": ctx, "gates": gates, **_named_weights(focal_weights)}
    ctx, gates, focal_weights, _ = _prepare(tensors, len(focal_weights), images=("ctx", "gates"))
    _check_aggregation(ctx, gates, focal_weights)
    if _must_be_plain(backend):
        return reference.gated_aggregation(ctx, gates, focal_weights, normalize_modulator)
    if key is not None:
        eager.remember(key, "gated_aggregation", ctx, focal_weights, backend)
    return torch.ops.focalnet.gated_aggregation(ctx, gates, focal_weights, normalize_modulator, backend)


def _must_be_plain(backend: str | None) -> bool:
    """Whether this call must run as plain PyTorch operations.

    ONNX export and torch.func transformations support nothing else. A graph from torch.jit.trace usually runs where
    this package is not installed (OpenVINO, Core ML, LibTorch), so it contains the operator only if a backend other
    than the reference was requested by name. A program from torch.export contains the operator unless the reference
    was requested.
    """
    if torch.onnx.is_in_onnx_export():
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return requested(backend) in (None, "reference")
    if torch.compiler.is_compiling():
        return is_exporting() and requested(backend) == "reference"
    if not torch._C._are_functorch_transforms_active():
        return False
    if requested(backend) not in (None, "reference"):
        raise RuntimeError(
            f"backend {requested(backend)!r} cannot run inside a torch.func transformation (grad, vmap, jvp, ...): "
            f"only 'reference' can. Leave the backend out."
        )
    return True


def _named_weights(focal_weights: Sequence[Tensor]) -> dict[str, Tensor]:
    if not isinstance(focal_weights, (list, tuple)):
        raise TypeError(f"focal_weights: expected a list of tensors, one a level, got {type(focal_weights).__name__}")
    if not focal_weights:
        raise ValueError("focal_weights: expected at least one level, got an empty list")
    return {f"focal_weights[{level}]": weight for level, weight in enumerate(focal_weights)}


def _checked(
    q: Tensor, ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor | None]:
    """The arguments of `focal_modulation`, cast under autocast and checked; ``weight`` as a matrix."""
    tensors = {"q": q, "ctx": ctx, "gates": gates, **_named_weights(focal_weights), "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    q, ctx, gates, levels, (weight, *rest) = _prepare(tensors, len(focal_weights), images=("q", "ctx", "gates"))
    bias = rest[0] if rest else None
    _check_aggregation(ctx, gates, levels)
    _check_shape("q", q, ctx.shape, "the shape of ctx")
    channels = ctx.shape[-1]
    if tuple(weight.shape) not in ((channels, channels), (channels, channels, 1, 1)):
        raise ValueError(
            f"weight: expected shape ({channels}, {channels}) or ({channels}, {channels}, 1, 1) for the {channels} "
            f"channels of ctx, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check_shape("bias", bias, (channels,), f"one value for each of the {channels} channels of ctx")
    return q, ctx, gates, levels, weight.view(channels, channels), bias


def _prepare(tensors: dict[str, Tensor], levels: int, images: tuple[str, ...]) -> list[Any]:
    """``[*images, focal_weights, the rest]``, cast under autocast, checked to share one dtype and one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; call .to_dense() on it")
    first_name, first = next(iter(tensors.items()))
    if (dtype := autocast_dtype(first.device.type)) is not None:
        tensors = _autocast(tensors, dtype)
        first = tensors[first_name]
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name}: expected {first.dtype}, the dtype of {first_name}, got {tensor.dtype}; "
                f"cast one of them, or run under torch.autocast"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, that of {first_name}, got {tensor.device}")
    values = list(tensors.values())
    split = len(images) + levels
    return [*values[: len(images)], values[len(images) : split], values[split:]]


def _autocast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast everything except float64 to the autocast dtype, as PyTorch's own operators do."""
    return {name: tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for name, tensor in tensors.items()}


def _check_aggregation(ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor]) -> None:
    if ctx.ndim != 4:
        raise ValueError(f"ctx: expected 4 dimensions (B, H, W, C), got {ctx.ndim}: {tuple(ctx.shape)}")
    batch, height, width, channels = ctx.shape
    if height < 1 or width < 1 or channels < 1:
        raise ValueError(f"ctx: expected H, W and C of at least 1, got shape {tuple(ctx.shape)}")
    levels = len(focal_weights)
    _check_shape("gates", gates, (batch, height, width, levels + 1), f"(B, H, W, L + 1) for {levels} focal_weights")
    for level, weight in enumerate(focal_weights):
        if weight.ndim != 4 or weight.shape[:2] != (channels, 1):
            raise ValueError(
                f"focal_weights[{level}]: expected shape ({channels}, 1, kh, kw) for the {channels} channels of ctx, "
                f"got {tuple(weight.shape)}"
            )
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
            raise ValueError(
                f"focal_weights[{level}]: expected odd kernel sizes, got {weight.shape[2]} x {weight.shape[3]}; "
                f"an even kernel has no centre"
            )


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, {meaning}, got {tuple(tensor.shape)}")

"""The Triton kernels on whole rows of channels: who can take them, their operands, and the plan of a call.

They stand beside the focal modulation in a block (kernels/residual.py, residual_norm.py, layer_norm.py), and the
operators of `residual`, `residual_norm`, `norm_linear` and `norm_mlp` run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import triton as triton_backend

if TYPE_CHECKING:
    from ..kernels.plan import Plan

MOST_CHANNELS, MOST_ROWS = 4096, 2**30


def reason_against(rows: Tensor) -> str | None:
    """Why the kernels do not take rows (..., C) like these, or None."""
    if reason := triton_backend.missing():
        return reason
    import triton

    expected = "cpu" if triton.knobs.runtime.interpret else "cuda"
    if rows.device.type != expected:
        return f"the tensors are on {rows.device}, not on a {expected} device"
    if rows.dtype not in triton_backend.DTYPES:
        return f"{rows.dtype} is not one of {', '.join(map(str, triton_backend.DTYPES))}"
    if not 1 <= rows.shape[-1] <= MOST_CHANNELS:
        return f"{rows.shape[-1]} channels are more than {MOST_CHANNELS}, or none"
    if rows.shape[:-1].numel() >= MOST_ROWS:
        return f"there are {MOST_ROWS} positions or more"
    return None


def reason_against_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> str | None:
    """Why the kernels do not take a LayerNorm of rows (..., C) like these, or None."""
    if weight is None or bias is None:
        return "the norm has no weight or no bias"
    if not eps:
        return "the norm has eps 0; the kernels divide by the deviation of rows of zeros beyond the last one"
    return reason_against(rows)


def layer_norm_bwd(
    dnormed: Tensor,
    hidden_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    output_mask: list[bool],
    normed_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """[normed, dhidden_state, dweight, dbias]; normed in ``normed_dtype`` unless that is None, the others by mask."""
    need_hidden, *need_parameters = output_mask
    operands = {"dnormed": dnormed, "hidden_state": hidden_state, "weight": weight, "bias": bias}
    wanted = {"dhidden_state": hidden_state.dtype if need_hidden else None, "normed": normed_dtype}
    sums = (2, weight.dtype) if any(need_parameters) else None
    dhidden_state, normed, made = run("layer_norm_bwd", operands, wanted, sums, eps=eps)
    dparameters = [None, None] if made is None else made.unbind()
    return [
        normed,
        dhidden_state,
        *(d if need else None for d, need in zip(dparameters, need_parameters, strict=True)),
    ]


def run(
    operator: str,
    operands: Mapping[str, Tensor | None],
    outputs: Mapping[str, torch.dtype | None],
    sums: tuple[int, torch.dtype] | None = None,
    *,
    keep: float = 1.0,
    eps: float = 0.0,
) -> list[Tensor | None]:
    """The ``outputs`` in their order, each like the first operand (B, ..., C); and the ``sums`` (number, C).

    Args:
        operator: "residual", "residual_bwd", "residual_norm", "residual_norm_bwd" or "layer_norm_bwd".
        operands: by the names of the kernel's arguments; None where one is not given.
        outputs: the dtype of each, None for one that is not wanted.
        sums: how many gradients of parameters (C,), and their dtype.
        keep: probability of keeping a sample.
        eps: of the norm.
    """
    given = {name: tensor.contiguous() for name, tensor in operands.items() if tensor is not None}
    first = next(iter(given.values()))
    wanted = {name: dtype for name, dtype in outputs.items() if dtype is not None}
    if not first.numel():
        made = {name: first.new_empty(first.shape, dtype=dtype) for name, dtype in wanted.items()}
        if sums:
            made["sums"] = first.new_zeros((sums[0], first.shape[-1]), dtype=sums[1])
    elif not wanted and not sums:
        made = {}
    else:
        made = _run(operator, given, wanted, sums, keep, eps)
    images = [made[name].view(first.shape) if name in made else None for name in outputs]
    return [*images, made.get("sums")]


# ---- plans ----------------------------------------------------------------------------------------------------------

_plans: dict[tuple, Plan] = {}
_MOST_PLANS = 4096


def _run(
    operator: str,
    operands: dict[str, Tensor],
    outputs: dict[str, torch.dtype],
    sums: tuple[int, torch.dtype] | None,
    keep: float,
    eps: float,
) -> dict[str, Tensor]:
    first = next(iter(operands.values()))
    # A compiled launch relies on whether a pointer is aligned to 16 bytes.
    kinds = [(name, tensor.dtype, tensor.data_ptr() & 15 == 0) for name, tensor in operands.items()]
    key = (operator, first.device, first.shape, *kinds, *outputs.items(), sums, keep, eps)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(operator, operands, outputs, sums, keep, eps)
    if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
        return plan.run(operands, first.device)
    with torch.cuda.device(first.device):
        return plan.run(operands, first.device)


def _plan(
    operator: str,
    operands: dict[str, Tensor],
    outputs: dict[str, torch.dtype],
    sums: tuple[int, torch.dtype] | None,
    keep: float,
    eps: float,
) -> Plan:
    from ..kernels import layer_norm, residual, residual_norm
    from ..kernels.plan import Device
    from ..kernels.rows import RowsCase

    make = {
        "residual": residual.forward_plan,
        "residual_bwd": residual.backward_plan,
        "residual_norm": residual_norm.forward_plan,
        "residual_norm_bwd": residual_norm.backward_plan,
        "layer_norm_bwd": layer_norm.backward_plan,
    }[operator]
    first = next(iter(operands.values()))
    rows = first.shape[:-1].numel()
    types = {name: tensor.dtype for name, tensor in operands.items()}
    count, outputs = (0, outputs) if sums is None else (sums[0], {**outputs, "sums": sums[1]})
    case = RowsCase(rows, rows // first.shape[0], first.shape[-1], types, outputs, count, keep, eps)
    return make(case, Device.of(first.device))

"""The operators on whole rows of channels that stand beside the focal modulation in a block, by Triton kernels.

Their operands are arranged here as the kernels take them (kernels/residual.py, residual_norm.py, layer_norm.py), and a
plan is made for each kind of call, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .problem import Problem

if TYPE_CHECKING:
    from ..kernels.plan import Plan

MAX_CHANNELS, MAX_ROWS = 4096, 2**30


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not take rows like these, or None."""
    if not problem.has_affine_norm:
        return "the norm has no weight, no bias, or an eps of 0, by which the padding of a row would be divided"
    if not 1 <= problem.channels <= MAX_CHANNELS:
        return f"{problem.channels} channels are more than {MAX_CHANNELS}, or none"
    if problem.batch * problem.height * problem.width >= MAX_ROWS:
        return f"there are {MAX_ROWS} positions or more"
    return None


def residual(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    operands = {"hidden_state": hidden_state, "update": update, "gamma": gamma, "kept": kept}
    operands |= {"weight": norm_weight, "bias": norm_bias}
    out, _ = run("residual", operands, {"out": hidden_state.dtype}, keep=keep, eps=eps)
    return out


def residual_bwd(
    dout: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
) -> list[Tensor | None]:
    need_update, need_parameters = output_mask
    parameters = [p for p in (gamma, norm_weight, norm_bias) if p is not None]
    operands = {"dout": dout, "update": update, "gamma": gamma, "kept": kept}
    operands |= {"weight": norm_weight, "bias": norm_bias}
    wanted = {"dupdate": update_dtype if need_update else None}
    # With a norm the kernel always sums for three parameters. Without gamma, the first sum belongs to none.
    sums = (3 if norm_weight is not None else 1, parameters[0].dtype) if need_parameters else None
    dupdate, made = run("residual_bwd", operands, wanted, sums, keep=keep, eps=eps)
    return [dupdate, None if made is None else made[-len(parameters) :]]


def residual_norm(
    hidden_state: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    operands = {"hidden_state": hidden_state, "update": update, "gamma": gamma, "kept": kept}
    operands |= {"weight": norm_weight, "bias": norm_bias}
    wanted = {"out": hidden_state.dtype, "normed": norm_dtype}
    out, normed, _ = run("residual_norm", operands, wanted, keep=keep, eps=eps)
    return out, normed


def residual_norm_bwd(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    kept: Tensor | None,
    keep: float,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update_dtype: torch.dtype,
    output_mask: list[bool],
) -> list[Tensor | None]:
    need_hidden, need_update, need_parameters = output_mask
    operands = {"dout": dout, "dnormed": dnormed, "out": out, "update": update, "gamma": gamma, "kept": kept}
    operands["weight"] = norm_weight
    wanted = {"dhidden_state": out.dtype if need_hidden else None, "dupdate": update_dtype if need_update else None}
    sums = (2 if gamma is None else 3, norm_weight.dtype) if need_parameters else None
    return run("residual_norm_bwd", operands, wanted, sums, keep=keep, eps=eps)


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
_MAX_PLANS = 4096


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
        if len(_plans) >= _MAX_PLANS:
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


OPERATORS = {
    "residual": residual,
    "residual_bwd": residual_bwd,
    "residual_norm": residual_norm,
    "residual_norm_bwd": residual_norm_bwd,
    "layer_norm_bwd": layer_norm_bwd,
}

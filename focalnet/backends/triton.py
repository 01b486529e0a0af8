"""The backend `triton`. It brings operands into the layout of the kernels and runs a plan, made once for each kind of
call.

The file is long because operators on rows and on maps share it. They share how plans are kept and run, and a training
step passes through one file fewer for every block.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import or_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_plans
from .problem import Problem
from .triton_plans import FOCAL_WEIGHTS

if TYPE_CHECKING:
    from ..kernels.plan import Plan

Kept = TypeVar("Kept")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_LEVELS, MAX_KERNEL = triton_plans.MAX_LEVELS, 15
MAX_CHANNELS, MAX_ROWS = 4096, 2**30
MIN_TRITON, MIN_CAPABILITY = (3, 6), (8, 0)
TAKES_OUT = True


@functools.cache
def missing() -> str | None:
    """Why this machine cannot run the backend, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        return f"triton {triton.__version__} is too old, 3.6 is needed: pip install --upgrade triton"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "the CUDA device has a compute capability below 8.0"
    return None


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not take this call, or None."""
    import triton

    expected = "cpu" if triton.knobs.runtime.interpret else "cuda"
    if problem.device.type != expected:
        return f"the tensors are on {problem.device}, not on a {expected} device"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if problem.operator in OPTIONAL:
        return _why_not_rows(problem)
    if reason := too_large(problem):
        return reason
    if len(problem.kernel_sizes) > MAX_LEVELS:
        return f"{len(problem.kernel_sizes)} levels are more than {MAX_LEVELS}"
    if max(map(max, problem.kernel_sizes)) > MAX_KERNEL:
        return f"kernel {max(map(max, problem.kernel_sizes))} is larger than {MAX_KERNEL}"
    if problem.operator.endswith("_bwd") and _would_spill(problem):
        return "gradients of three levels or more in float32 with kernels above 11 do not fit the registers"
    if problem.batch * problem.height * problem.width >= 2**31:
        return "there are 2^31 positions or more"
    return None


def _would_spill(problem: Problem) -> bool:
    from ..kernels.launch_table import backward_would_spill

    return backward_would_spill(tuple(height for height, _ in problem.kernel_sizes), problem.dtype)


# Calls whose launch this device refused, with the reason.
_too_large: dict[Problem, str] = {}


def too_large(problem: Problem) -> str | None:
    """Why an earlier call like this one did not fit the device, or None."""
    return _too_large.get(problem) if _too_large else None


def out_of_resources(error: Exception, problem: Problem) -> str | None:
    """Why ``error`` says that a launch does not fit this device, or None if it says something else.

    `why_not` gives the same reason from then on.
    """
    import triton

    if not isinstance(error, triton.runtime.errors.OutOfResources):
        return None
    _too_large[problem] = f"a kernel does not fit the device: {error}"
    return _too_large[problem]


def gated_aggregation(
    ctx: Tensor, gates: Tensor, focal_weights: Sequence[Tensor], normalize_modulator: bool
) -> Tensor:
    if not ctx.shape[0]:
        return ctx.new_empty(ctx.shape)
    return _run("gated_aggregation", _named(ctx, gates, focal_weights), normalize_modulator)["agg"]


def focal_modulation(
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
) -> Tensor:
    if not ctx.shape[0]:
        return ctx.new_empty(ctx.shape)
    operands = _named(ctx, gates, focal_weights, q, weight, bias)
    return _run("focal_modulation", operands, normalize_modulator)["out"]


def gated_aggregation_bwd(
    dagg: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    normalize_modulator: bool,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_ctx, need_gates, need_focal = output_mask
    wanted = [need_ctx, need_gates, *[need_focal] * len(focal_weights)]
    if not ctx.shape[0] or not any(output_mask):
        return _zeros([ctx, gates, *focal_weights], wanted)
    operands = _named(ctx, gates, focal_weights) | {"dagg": dagg}
    made = _run("gated_aggregation_bwd", operands, normalize_modulator, tuple(output_mask))
    return [made.get(name) for name in ("dctx", "dgates", *_gradients_of(focal_weights))]


def focal_modulation_bwd(
    dout: Tensor,
    q: Tensor,
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    normalize_modulator: bool,
    output_mask: Sequence[bool],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """``out``: dq, dctx and dgates to write to, parts of one tensor whose rows are evenly spaced."""
    *needs, need_focal = output_mask
    if not ctx.shape[0] or not any(output_mask):
        like_bias = weight[0] if bias is None else bias
        return _zeros([q, ctx, gates, weight, like_bias, *focal_weights], [*needs, *[need_focal] * len(focal_weights)])
    operands = _named(ctx, gates, focal_weights, q, weight, bias) | {"dout": dout}
    written = {} if out is None else dict(zip(WRITTEN, out, strict=True))
    made = _run("focal_modulation_bwd", operands | written, normalize_modulator, tuple(output_mask)) | written
    return [made.get(n) for n in ("dq", "dctx", "dgates", "dweight", "dbias", *_gradients_of(focal_weights))]


def _gradients_of(focal_weights: Sequence[Tensor]) -> list[str]:
    return [f"dw{level}" for level in range(len(focal_weights))]


def _zeros(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of an empty batch."""
    return [t.new_zeros(t.shape) if want else None for t, want in zip(tensors, wanted, strict=True)]


# ---- operands -------------------------------------------------------------------------------------------------------


WRITTEN = ("dq", "dctx", "dgates")
_IMAGES = ("ctx", "gates", "q", *WRITTEN)


def _named(
    ctx: Tensor,
    gates: Tensor,
    focal_weights: Sequence[Tensor],
    q: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The operands by name, in the order of a plan's operands."""
    operands = {"ctx": ctx, "gates": gates, **dict(zip(FOCAL_WEIGHTS, focal_weights, strict=False))}
    if q is not None and weight is not None:
        operands["q"], operands["weight"] = q, weight
    if bias is not None:
        operands["bias"] = bias
    return operands


def as_the_kernels_take_them(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Operands in the layout of the kernels: images as evenly spaced rows of channels, all others contiguous.

    Operands in another layout are copied.
    """
    return {
        name: tensor if name in _IMAGES and pitch(tensor) is not None else tensor.contiguous()
        for name, tensor in operands.items()
    }


def pitch(tensor: Tensor) -> int | None:
    """The number of elements from one position to the next, or None if it varies or channels are not adjacent."""
    batch, height, width, channels = tensor.shape
    to_image, to_row, to_column, to_channel = tensor.stride()
    if to_channel != 1 and channels != 1:
        return None
    if width == 1:
        to_column = to_row if height > 1 else to_image if batch > 1 else channels
    if (height > 1 and to_row != width * to_column) or (batch > 1 and to_image != height * width * to_column):
        return None
    return to_column


# ---- plans ----------------------------------------------------------------------------------------------------------

# The plan, and whether operands with this key need no copy.
_plans: dict[tuple[Any, ...], tuple[Plan, bool]] = {}
_MAX_PLANS = 4096


def _run(
    operator: str, operands: dict[str, Tensor], normalize: bool, mask: tuple[bool, ...] = ()
) -> dict[str, Tensor]:
    # The key holds everything that a plan and its compiled code depend on: sizes, strides, and whether each pointer is
    # aligned to 16 bytes.
    ctx, tensors = operands["ctx"], operands.values()
    device = ctx.device
    addresses = [tensor.data_ptr() for tensor in tensors]
    aligned = functools.reduce(or_, addresses) & 15 == 0 or tuple([address & 15 == 0 for address in addresses])
    shapes = [(tensor.shape, tensor.stride()) for tensor in tensors]
    # Not allow_tf32: reading that raises once anybody has set fp32_precision.
    precise = torch.backends.cuda.matmul.fp32_precision != "tf32"
    key = (operator, device, ctx.dtype, normalize, mask, precise, aligned, *shapes)
    found = _plans.get(key)
    if found is None:
        taken = as_the_kernels_take_them(operands)
        as_given = all(taken[name] is tensor for name, tensor in operands.items())
        found = _keep(_plans, key, (triton_plans.make(operator, taken, normalize, mask, precise), as_given))
    with _current(device):
        return _run_plan(*found, operands, addresses)


def _keep(plans: dict[tuple[Any, ...], Kept], key: tuple[Any, ...], plan: Kept) -> Kept:
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is the current one; switching takes time, so not if it is already."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)


def _run_plan(plan: Plan, as_given: bool, operands: dict[str, Tensor], addresses: list[int]) -> dict[str, Tensor]:
    if as_given and plan.is_warm:
        return plan.run_at(addresses, operands["ctx"].device)
    return plan.run(as_the_kernels_take_them(operands), operands["ctx"].device)


# ---- operators on rows of channels, beside the focal modulation in a block ------------------------------------------


def _why_not_rows(problem: Problem) -> str | None:
    """Why the kernels do not take rows like these, or None."""
    if not problem.has_affine_norm:
        return "the norm has no weight, no bias, or an eps of 0, and then the padding of a row would be divided by 0"
    if not 1 <= problem.channels <= MAX_CHANNELS:
        return f"{problem.channels} channels are outside the range 1 to {MAX_CHANNELS}"
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
    out, _ = _rows("residual", operands, {"out": hidden_state.dtype}, keep=keep, eps=eps)
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
    # With a norm the kernel always writes three sums. Without gamma the first sum is unused.
    sums = (3 if norm_weight is not None else 1, parameters[0].dtype) if need_parameters else None
    dupdate, made = _rows("residual_bwd", operands, wanted, sums, keep=keep, eps=eps)
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
    out, normed, _ = _rows("residual_norm", operands, wanted, keep=keep, eps=eps)
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
    return _rows("residual_norm_bwd", operands, wanted, sums, keep=keep, eps=eps)


def layer_norm_bwd(
    dnormed: Tensor,
    hidden_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    output_mask: list[bool],
    normed_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """[normed, dhidden_state, dweight, dbias], each None unless requested.

    ``normed_dtype`` requests normed in that dtype; ``output_mask`` requests the gradients.
    """
    need_hidden, *need_parameters = output_mask
    operands = {"dnormed": dnormed, "hidden_state": hidden_state, "weight": weight, "bias": bias}
    wanted = {"dhidden_state": hidden_state.dtype if need_hidden else None, "normed": normed_dtype}
    sums = (2, weight.dtype) if any(need_parameters) else None
    dhidden_state, normed, made = _rows("layer_norm_bwd", operands, wanted, sums, eps=eps)
    dparameters = [None, None] if made is None else made.unbind()
    return [
        normed,
        dhidden_state,
        *(d if need else None for d, need in zip(dparameters, need_parameters, strict=True)),
    ]


def _rows(
    operator: str,
    operands: Mapping[str, Tensor | None],
    outputs: Mapping[str, torch.dtype | None],
    sums: tuple[int, torch.dtype] | None = None,
    *,
    keep: float = 1.0,
    eps: float = 0.0,
) -> list[Any]:
    """Run an operator on rows. Returns [*outputs, each shaped like the first operand, the sums (number, C)].

    Tensors, and None for what is not wanted.

    Args:
        operator: "residual", "residual_bwd", "residual_norm", "residual_norm_bwd" or "layer_norm_bwd".
        operands: tensors by the names of the kernel's arguments; None for one that is not given.
        outputs: the dtype of each output, or None for an output that is not requested.
        sums: the number of gradients of parameters (C,), and their dtype; None requests no sums.
        keep: probability of keeping a sample.
        eps: epsilon of the norm.
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
        made = _run_rows(operator, given, wanted, sums, keep, eps)
    images = [made[name].view(first.shape) if name in made else None for name in outputs]
    return [*images, made.get("sums")]


_row_plans: dict[tuple[Any, ...], Plan] = {}


def _run_rows(
    operator: str,
    operands: dict[str, Tensor],
    outputs: dict[str, torch.dtype],
    sums: tuple[int, torch.dtype] | None,
    keep: float,
    eps: float,
) -> dict[str, Tensor]:
    first = next(iter(operands.values()))
    # A compiled launch depends on whether each pointer is aligned to 16 bytes.
    kinds = [(name, tensor.dtype, tensor.data_ptr() & 15 == 0) for name, tensor in operands.items()]
    key = (operator, first.device, first.shape, *kinds, *outputs.items(), sums, keep, eps)
    plan = _row_plans.get(key)
    if plan is None:
        plan = _keep(_row_plans, key, _row_plan(operator, operands, outputs, sums, keep, eps))
    with _current(first.device):
        return plan.run(operands, first.device)


def _row_plan(
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


OPTIONAL = {
    "padded_linear": F.linear,
    "residual": residual,
    "residual_bwd": residual_bwd,
    "residual_norm": residual_norm,
    "residual_norm_bwd": residual_norm_bwd,
    "layer_norm_bwd": layer_norm_bwd,
}

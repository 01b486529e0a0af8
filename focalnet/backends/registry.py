"""The registry of backends. It decides for every operator which backend runs a call, and gives the reason.

A backend has two predicates: ``missing()`` for this machine and ``why_not(problem)`` for one call. Each returns None
("yes") or the reason why not, so that the decision and its explanation cannot differ. A backend requested by argument,
by context or by the environment takes precedence over the automatic order, which on a GPU `gpu_order` decides.

Every backend implements focal modulation and gated aggregation. `choose` returns the implementation, or raises an
error with the reason why the requested backend cannot run. All other operators are optional: some backends have a
kernel for them, and PyTorch's own operators run otherwise. `optional` returns the kernel or the reason why there is
none.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import cpu, cuda, extension, gpu_order
from . import triton as triton_backend
from .problem import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A set of implementations: ``operators`` maps an operator's name to the function that runs it.

    Functions for focal modulation and gated aggregation have the signatures of `focalnet.reference`. Every other
    function has the signature of the operator with the same name, without ``backend``. With ``takes_out`` the function
    focal_modulation_bwd has one more argument, ``out``: where it writes dq, dctx and dgates if it can. It returns the
    tensors of ``out`` that it wrote, and others in the place of those that it did not.
    """

    name: str
    operators: dict[str, Callable[..., Any]]
    missing: Callable[[], str | None]
    accepts: Callable[[Problem], str | None]
    takes_out: bool = False

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot run ``problem`` here, or None if it can."""
        if reason := self.missing():
            return reason
        if problem.operator not in self.operators:
            return f"it has no kernel for {problem.operator}"
        return self.accepts(problem)


def _nothing(_: object = None) -> None:
    return None


def _backend(name: str, module: ModuleType) -> Backend:
    names = ("gated_aggregation", "gated_aggregation_bwd", "focal_modulation", "focal_modulation_bwd")
    operators = {name: getattr(module, name) for name in names} | getattr(module, "OPTIONAL", {})
    missing, why_not = getattr(module, "missing", _nothing), getattr(module, "why_not", _nothing)
    return Backend(name, operators, missing, why_not, getattr(module, "TAKES_OUT", False))


_REGISTRY = {
    name: _backend(name, module)
    for name, module in (("triton", triton_backend), ("cuda", cuda), ("cpu", cpu), ("reference", reference))
}
_AUTOMATIC_ORDER = {"cpu": ("cpu", "reference")}  # on a GPU it depends on the problem
_ENVIRONMENT_VARIABLE = "FOCALNET_BACKEND"
_in_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("focalnet_backend", default=None)


def backends() -> dict[str, str | None]:
    """The name of every backend, with the reason why it cannot run on this machine, or None if it can.

    Examples:
        >>> focalnet.backends()["reference"] is None
        True
    """
    return {name: backend.missing() for name, backend in _REGISTRY.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on the backend ``name``: "triton", "cuda", "cpu" or "reference".

    A ``backend=`` argument takes precedence over the context, and the context over the environment variable
    FOCALNET_BACKEND. If forward ran inside the block, its backward uses the same backend, even outside the block. If
    the backend has no kernel for an optional operator (LayerNorm, MLP, residual), PyTorch's operators run.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: raised by the operator if the backend cannot run it; the message says why.
    """
    token = _in_context.set(_known(name, "use_backend(name)"))
    try:
        yield
    finally:
        _in_context.reset(token)


def requested(backend: str | None) -> str | None:
    """The backend requested by argument, context or environment, in this order; None if none was requested.

    Raises:
        ValueError: no backend has that name.
    """
    if backend is not None:
        return _known(backend, "backend")
    return _requested_around()


def _requested_around() -> str | None:
    if (in_context := _in_context.get()) is not None:
        return in_context
    if from_environment := os.environ.get(_ENVIRONMENT_VARIABLE):
        return _known(from_environment, f"the environment variable {_ENVIRONMENT_VARIABLE}")
    return None


# Dynamo cannot read a ContextVar. This attribute is what torch.compiler.assume_constant_result sets, without importing
# Dynamo. A graph keeps the backend that was requested when the graph was made.
_requested_around._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    operator: str,
    ctx: Tensor,
    focal_weights: Sequence[Tensor],
    backend: str | None,
    out: Sequence[Tensor] | None = None,
) -> Callable[..., Any]:
    """The function that runs ``operator`` on a map ``ctx`` (B, H, W, C).

    It is that of the requested backend, or else of the first backend that can run the call. ``out`` is given to
    backends that take it (see `Backend`).

    Raises:
        ValueError: no backend has the given name.
        RuntimeError: the requested backend cannot run the call; the message says why.
    """
    kernel_sizes = tuple([weight.shape[-2:] for weight in focal_weights])
    batch, height, width, channels = ctx.shape
    problem = Problem(operator, ctx.device, ctx.dtype, batch, height, width, channels, kernel_sizes)
    name = requested(backend)
    if name is not None:
        reason = _REGISTRY[name].why_not(problem)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} cannot run {problem.operator} here: {reason}. "
                f"Omit the backend to let focalnet choose, or run `focalnet info` for the state of every backend."
            )
        return _function(name, operator, out)
    name = automatic(problem)
    if name == "reference" and problem.device.type == "cpu" and cpu.why_not(problem) is None:
        extension.warn_if_missing()
    if name == "triton":
        return functools.partial(_triton_or_next, problem, out)
    return _function(name, operator, out)


def _function(name: str, operator: str, out: Sequence[Tensor] | None) -> Callable[..., Any]:
    run = _REGISTRY[name].operators[operator]
    return run if out is None or not _REGISTRY[name].takes_out else functools.partial(run, out=out)


def _triton_or_next(problem: Problem, out: Sequence[Tensor] | None, *arguments: Any) -> Any:
    """Run ``problem`` on Triton, or on the next backend if a kernel needs more than the device has."""
    if triton_backend.too_large(problem) is None:
        try:
            return _function("triton", problem.operator, out)(*arguments)
        except Exception as error:
            reason = triton_backend.out_of_resources(error, problem)
            if reason is None:
                raise
            logger.warning("%s: not on backend triton: %s", problem.operator, reason)
    return _function(automatic(problem), problem.operator, out)(*arguments)


def optional(
    operator: str,
    rows: Tensor,
    backend: str | None,
    *,
    norm: tuple[Tensor | None, Tensor | None, float | None] | None = None,
    widths: tuple[int, ...] = (),
) -> Callable[..., Any] | str:
    """The kernel of ``operator`` for ``rows`` (..., C), or the reason why PyTorch's operators must run.

    ``norm`` holds weight, bias and eps of the operator's LayerNorm; it is empty for operators without one. ``widths``
    are the output features of its linear layers.
    """
    *positions, channels = rows.shape
    has_affine_norm = not norm or (norm[0] is not None and norm[1] is not None and bool(norm[2]))
    count = torch.Size(positions).numel()
    problem = Problem(operator, rows.device, rows.dtype, 1, count, 1, channels, (), has_affine_norm, widths)
    return optional_kernel(problem, backend)


def optional_kernel(problem: Problem, backend: str | None) -> Callable[..., Any] | str:
    """The kernel that runs ``problem``, or the reason why PyTorch's operators must run."""
    name = requested(backend)
    candidates = _order(problem) if name is None else (name,)
    reasons = []
    for candidate in candidates:
        reason = _REGISTRY[candidate].why_not(problem)
        if reason is None:
            return _REGISTRY[candidate].operators[problem.operator]
        if candidate != "reference":
            reasons.append(f"not on backend {candidate}: {reason}")
    reason = "; ".join(reasons) or f"backend {name!r} was asked for, which has no kernel of its own"
    logger.debug("%s: %s", problem.operator, reason)
    return reason


def pads(device: torch.device, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether a backend that may run focal modulation of ``dtype`` wants rows of the projection padded."""
    return _pads(device, dtype, requested(backend))


@functools.lru_cache(256)
def _pads(device: torch.device, dtype: torch.dtype, requested: str | None) -> bool:
    return not isinstance(optional_kernel(Problem("padded_linear", device, dtype), requested), str)


# Dynamo cannot trace the predicates. See `_requested_around`.
pads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def automatic(problem: Problem) -> str:
    """The name of the first backend that can run ``problem``."""
    for name in _order(problem):
        reason = _REGISTRY[name].why_not(problem)
        if reason is None:
            return name
        logger.debug("%s: not on backend %s: %s", problem.operator, name, reason)
    raise AssertionError("the reference takes every problem")


def _order(problem: Problem) -> tuple[str, ...]:
    if problem.device.type == "cuda":
        return gpu_order.order(problem)
    return _AUTOMATIC_ORDER.get(problem.device.type, ("reference",))


def _known(name: str, source: str) -> str:
    if name not in _REGISTRY:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, _REGISTRY))}, got {name!r}")
    return name

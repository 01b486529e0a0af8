"""Who runs an operator, and why not another: the one place that decides, for every operator.

A backend answers two questions, each with None ("yes") or the reason against it: ``missing()`` about this machine and
``why_not(problem)`` about one call. The same answer decides and explains. A backend that was asked for by argument, by
context or by the environment wins over the automatic order.

Focal modulation and gated aggregation have an implementation in every backend: `choose` finds it, or raises the reason
why the backend that was asked for cannot run. Every other operator is optional: some backends have a kernel for it,
and PyTorch's own operators do the same elsewhere. `optional` returns its kernel, or the reason why there is none.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import cpu, cuda, extension
from . import triton as triton_backend
from .problem import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A set of implementations: ``operators`` maps an operator's name to the function that runs it.

    Those of focal modulation and gated aggregation have the signatures that `focalnet.reference` gives them; every
    other one has that of the operator of its name, without ``backend``.
    """

    name: str
    operators: dict[str, Callable[..., Any]]
    missing: Callable[[], str | None]
    accepts: Callable[[Problem], str | None]

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
    return Backend(name, operators, getattr(module, "missing", _nothing), getattr(module, "why_not", _nothing))


_REGISTRY = {
    name: _backend(name, module)
    for name, module in (("triton", triton_backend), ("cuda", cuda), ("cpu", cpu), ("reference", reference))
}
_AUTOMATIC_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_ENVIRONMENT_VARIABLE = "FOCALNET_BACKEND"
_in_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("focalnet_backend", default=None)


def backends() -> dict[str, str | None]:
    """Every backend's name, with the reason why it cannot run on this machine, or None where it can.

    Examples:
        >>> focalnet.backends()["reference"] is None
        True
    """
    return {name: backend.missing() for name, backend in _REGISTRY.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on the backend ``name``: "triton", "cuda", "cpu" or "reference".

    A ``backend=`` argument wins over the context, the context over the environment variable FOCALNET_BACKEND. The
    backward of a forward that ran inside the block uses the same backend, wherever it runs. Operators that the backend
    has no kernel for (LayerNorm, MLP and the residual, in some) are PyTorch's.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: from the operator, when the backend cannot run it; the message says why.
    """
    token = _in_context.set(_known(name, "use_backend(name)"))
    try:
        yield
    finally:
        _in_context.reset(token)


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument, context or environment, in this order; None leaves the choice to us."""
    if backend is not None:
        return _known(backend, "backend")
    return _requested_around()


def _requested_around() -> str | None:
    if (in_context := _in_context.get()) is not None:
        return in_context
    if from_environment := os.environ.get(_ENVIRONMENT_VARIABLE):
        return _known(from_environment, f"the environment variable {_ENVIRONMENT_VARIABLE}")
    return None


# Dynamo cannot read a ContextVar. This is what torch.compiler.assume_constant_result does, without importing Dynamo. A
# graph is for the backend that was asked for around the call that made it.
_requested_around._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(operator: str, ctx: Tensor, focal_weights: Sequence[Tensor], backend: str | None) -> Callable[..., Any]:
    """What runs ``operator`` on a map ``ctx`` (B, H, W, C): by the ``backend`` asked for, or by the first that can.

    Raises:
        RuntimeError: the backend that was asked for cannot; the message says why.
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
                f"Leave the backend out to let focalnet choose, or see `focalnet info`."
            )
        return _REGISTRY[name].operators[problem.operator]
    name = automatic(problem)
    if name == "reference" and problem.device.type == "cpu" and cpu.why_not(problem) is None:
        extension.warn_if_missing()
    return _REGISTRY[name].operators[problem.operator]


def optional(
    operator: str,
    rows: Tensor,
    backend: str | None,
    *,
    norm: tuple[Tensor | None, Tensor | None, float | None] | None = None,
) -> Callable[..., Any] | str:
    """The kernel of ``operator`` for ``rows`` (..., C), or the reason why PyTorch's operators have to run.

    ``norm`` are weight, bias and eps of the LayerNorm in it, if there is one.
    """
    *positions, channels = rows.shape
    has_affine_norm = not norm or (norm[0] is not None and norm[1] is not None and bool(norm[2]))
    count = torch.Size(positions).numel()
    problem = Problem(operator, rows.device, rows.dtype, 1, count, 1, channels, (), has_affine_norm)
    return optional_kernel(problem, backend)


def optional_kernel(problem: Problem, backend: str | None) -> Callable[..., Any] | str:
    """The kernel that runs ``problem``, or the reason why PyTorch's operators have to."""
    name = requested(backend)
    candidates = _AUTOMATIC_ORDER.get(problem.device.type, ()) if name is None else (name,)
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


def automatic(problem: Problem) -> str:
    """The name of the first backend that can run ``problem``."""
    for name in _AUTOMATIC_ORDER.get(problem.device.type, ("reference",)):
        reason = _REGISTRY[name].why_not(problem)
        if reason is None:
            return name
        logger.debug("%s: not on backend %s: %s", problem.operator, name, reason)
    raise AssertionError("the reference takes every problem")


def _known(name: str, source: str) -> str:
    if name not in _REGISTRY:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, _REGISTRY))}, got {name!r}")
    return name

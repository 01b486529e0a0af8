"""Who can run an operator, and why not.

A backend answers two questions, each with None ("yes") or the reason against it: ``missing()`` about this machine and
``refuses(problem)`` about one call. The same answer decides and explains: `choose` raises it for a backend that was
asked for by name, and logs it at debug level where the choice is automatic.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from .. import reference
from . import cpu, cuda, extension
from . import triton as triton_backend
from .problem import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A set of implementations: ``operators`` maps an operator's name to a function with the signature that
    `focalnet.reference` gives it."""

    name: str
    operators: dict[str, Callable]
    missing: Callable[[], str | None]
    refuses: Callable[[Problem], str | None]

    def reason_against(self, problem: Problem) -> str | None:
        reason = self.missing() or self.refuses(problem)
        if reason is None and problem.operator not in self.operators:
            return f"it does not implement {problem.operator}"
        return reason


def _always(_: object = None) -> None:
    return None


def _operators_of(module: ModuleType) -> dict[str, Callable]:
    names = ("gated_aggregation", "gated_aggregation_bwd", "focal_modulation", "focal_modulation_bwd")
    return {name: getattr(module, name) for name in names}


_REGISTRY = {
    backend.name: backend
    for backend in (
        Backend("triton", _operators_of(triton_backend), triton_backend.missing, triton_backend.refuses),
        Backend("cuda", _operators_of(cuda), cuda.missing, cuda.refuses),
        Backend("cpu", _operators_of(cpu), cpu.missing, cpu.refuses),
        Backend("reference", _operators_of(reference), _always, _always),
    )
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
    backward of a forward that ran inside the block uses the same backend, wherever it runs.

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
    """The backend asked for by argument, context or environment, in this order; None leaves the choice to `choose`."""
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
_requested_around._dynamo_marked_constant = True


def choose(problem: Problem, backend: str | None) -> Callable:
    """The implementation that runs ``problem``: that of the ``backend`` asked for, or the first that takes it."""
    name = requested(backend)
    if name is not None:
        reason = _REGISTRY[name].reason_against(problem)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} cannot run {problem.operator} here: {reason}. "
                f"Leave the backend out to let focalnet choose, or see `focalnet info`."
            )
        return _REGISTRY[name].operators[problem.operator]
    name = automatic(problem)
    if name == "reference" and problem.device.type == "cpu" and cpu.refuses(problem) is None:
        extension.warn_if_missing()
    return _REGISTRY[name].operators[problem.operator]


def automatic(problem: Problem) -> str:
    """The name of the first backend that takes ``problem``."""
    for name in _AUTOMATIC_ORDER.get(problem.device.type, ("reference",)):
        reason = _REGISTRY[name].reason_against(problem)
        if reason is None:
            return name
        logger.debug("%s: not on backend %s: %s", problem.operator, name, reason)
    raise AssertionError("the reference takes every problem")


def _known(name: str, source: str) -> str:
    if name not in _REGISTRY:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, _REGISTRY))}, got {name!r}")
    return name

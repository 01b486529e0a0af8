"""A trial of whether a module computes focal modulation. The module itself is not touched.

The trial runs on a twin, a copy with the module's class and settings, random weights and no hooks. Its own forward and
the new one must agree on one small random input. This rejects modules with the same parts that, for example, apply a
sigmoid to the gates, mask the map or mix the images of a batch. The twin makes it work for modules with weights on the
meta device, quantised weights and sharded weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # relative to the largest output; float32 rounding of one block stays below 1e-5
SIZE = (2, 5, 6)  # B, H, W: several images, and H differs from W, so that a swap of axes shows
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin_of(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode with random float32 weights on the CPU. ``module`` is not modified."""
    # Parametrised modules raise on copy.copy.
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)  # a rebound forward is bound to ``module``
    for name in _HOOKS:
        twin.__dict__[name] = OrderedDict()
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {
        name: None if parameter is None else _random_like(parameter, generator)
        for name, parameter in module._parameters.items()
    }
    twin.__dict__["_modules"] = {name: child and twin_of(child, generator) for name, child in module._modules.items()}
    return twin


def _random_like(parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Random values scaled so that activations stay near a magnitude of one."""
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
    values = torch.randn(parameter.shape, generator=generator, device="cpu") * fan_in**-0.5
    return nn.Parameter(values, requires_grad=False)


def differ_by(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def difference(
    module: nn.Module, own: Callable[[nn.Module, Tensor], Tensor], new: Callable[[nn.Module, Tensor], Tensor]
) -> str | None:
    """How ``new(twin, x)`` differs from ``own(twin, x)`` on a random x (B, H, W, C), or None if they agree.

    They agree if the largest difference is at most `TOLERANCE` times the largest output.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin = twin_of(module, generator)
        channels = next(p.shape[0] for name, p in twin.named_parameters() if "focal_layers" in name)
        x = torch.randn(*SIZE, channels, generator=generator)
        try:
            expected = own(twin, x)
        except Exception as error:
            return f"its own forward does not take a map alone ({type(error).__name__}: {error})"
        actual = new(twin, x)
        if not isinstance(expected, Tensor) or expected.shape != actual.shape:
            return "its own forward returns something else than one map of the same shape"
        off = differ_by(actual, expected)
    if not off <= TOLERANCE:
        return (
            f"its own forward computes something else: on a random input they differ by {off:.1e} of the largest value"
        )
    return None

"""The project's rule for results of low precision, checked against float64."""

import math

import torch


def ulp(exact, dtype):
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else torch.finfo(dtype).tiny


def assert_within_rule(name, ours, low, exact):
    assert ours.shape == exact.shape, name
    assert ours.dtype == low.dtype, name
    if not exact.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (low.double() - exact).abs().max().item() + ulp(exact, low.dtype)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

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


def assert_same_numbers(name, one, other, low, exact):
    """Two specialisations of a kernel, of which one leaves something out or reads other strides.

    Interpreted they give the same bits. Compiled they may differ in the last ones: which product of a sum becomes a
    multiply-add is the compiler's choice in each. Then each is held to the rule.
    """
    if torch.equal(one, other):
        return
    assert one.device.type != "cpu", f"{name}: not the same bits"
    for ours in (one, other):
        assert_within_rule(name, ours.cpu(), low, exact)

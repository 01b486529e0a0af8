"""A launch that needs more than the device has: the next backend runs the call, unless Triton was asked for."""

import logging
from dataclasses import replace

import pytest
import torch

import focalnet
from focalnet.backends import registry
from focalnet.backends import triton as triton_backend

errors = pytest.importorskip("triton.runtime.errors")


@pytest.fixture
def launches(monkeypatch):
    """Triton comes first on the CPU, and its launches fail as those that want too much shared memory do."""
    started = []

    def launch(*arguments, out=()):
        started.append((*arguments, *out))
        for part in out:  # what kernels may leave before one of them fails
            part.fill_(7)
        raise errors.OutOfResources(114688, 101376, "shared memory")

    def accepts(problem):
        return triton_backend.too_large(problem)

    full = replace(
        registry._REGISTRY["triton"],
        operators=dict.fromkeys(registry._REGISTRY["triton"].operators, launch),
        missing=lambda: None,
        accepts=accepts,
    )
    monkeypatch.setitem(registry._REGISTRY, "triton", full)
    monkeypatch.setitem(registry._AUTOMATIC_ORDER, "cpu", ("triton", "cpu", "reference"))
    monkeypatch.setattr(triton_backend, "_too_large", {})
    return started


def run(size=5, backend=None):
    generator = torch.Generator().manual_seed(size)
    ctx, gates = torch.randn(1, size, size, 8, generator=generator), torch.randn(1, size, size, 2, generator=generator)
    return focalnet.gated_aggregation(ctx, gates, [torch.ones(8, 1, 3, 3)], backend=backend)


def test_the_next_backend_runs_and_the_reason_is_logged_once(launches, caplog):
    with caplog.at_level(logging.WARNING, "focalnet"):
        found = [run(), run()]
    assert len(launches) == 1
    expected = run(backend="reference")
    assert all(torch.allclose(one, expected, atol=1e-6) for one in found)
    (record,) = caplog.records
    assert "not on backend triton" in record.message
    assert "Required: 114688" in record.message


def test_a_call_of_another_size_is_tried_again(launches):
    run(5)
    run(7)
    assert len(launches) == 2


def test_triton_asked_for_by_name_says_what_is_missing(launches):
    with pytest.raises(errors.OutOfResources, match="shared memory"):
        run(backend="triton")


def test_another_error_is_not_hidden(launches, monkeypatch):
    monkeypatch.setattr(triton_backend, "out_of_resources", lambda error, problem: None)
    with pytest.raises(errors.OutOfResources):
        run()


def test_the_next_backend_makes_a_packed_gradient_that_triton_began(launches):
    generator = torch.Generator().manual_seed(0)
    projected, dout = (torch.randn(1, 5, 5, size, generator=generator) for size in (18, 8))
    weight = torch.randn(8, 8, generator=generator)
    call = (dout, projected, [torch.ones(8, 1, 3, 3)], weight, None, False, [True, True, False, True])
    made = torch.ops.focalnet.packed_focal_modulation_bwd(*call, None)
    assert len(launches) == 1
    expected = torch.ops.focalnet.packed_focal_modulation_bwd(*call, "reference")
    for mine, value in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, value)

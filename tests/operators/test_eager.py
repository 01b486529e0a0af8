"""A call like one before goes straight to its backend; whatever observes operators still finds the operator."""

import contextlib
import logging

import pytest
import torch
from operands import Shape, operands
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet
from focalnet import functional, reference
from focalnet.operators import eager


@pytest.fixture
def checked(monkeypatch):
    """The calls whose arguments were checked, by the first argument's name."""
    calls = []
    prepare = functional._prepare

    def recording(tensors, *rest, **named):
        calls.append(next(iter(tensors)))
        return prepare(tensors, *rest, **named)

    monkeypatch.setattr(functional, "_prepare", recording)
    monkeypatch.setattr(eager, "_runs", {})
    return calls


def both(arguments):
    _, ctx, gates, focal_weights, *_ = arguments
    modulated = focalnet.focal_modulation(*arguments, backend="reference")
    return modulated, focalnet.gated_aggregation(ctx, gates, focal_weights, backend="reference")


@pytest.mark.parametrize("shape", [Shape(), Shape(bias=False), Shape(batch=0)], ids=str)
def test_a_call_like_one_before_is_not_checked_again_and_gives_the_same_bits(shape, checked):
    arguments = operands(shape)
    first = both(arguments)
    again = both(arguments)
    assert checked == ["q", "ctx"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_weight_of_a_1x1_convolution_is_taken_directly_too(checked):
    q, ctx, gates, focal_weights, weight, bias = operands(Shape())
    expected = reference.focal_modulation(q, ctx, gates, focal_weights, weight, bias)
    for _ in range(2):
        made = focalnet.focal_modulation(
            q, ctx, gates, focal_weights, weight[..., None, None], bias, backend="reference"
        )
        torch.testing.assert_close(made, expected)
    assert checked == ["q"]


@pytest.mark.parametrize(
    "position, change, error, message",
    [
        (0, lambda q: q.double(), TypeError, "ctx: expected torch.float64"),
        (0, lambda q: q[:, :1], ValueError, "q: expected shape"),
        (2, lambda gates: gates[..., :-1], ValueError, "gates: expected shape"),
        (3, lambda weights: weights[:-1], ValueError, "gates: expected shape"),
        (3, lambda weights: weights[0], TypeError, "focal_weights: expected a list"),
        (4, lambda weight: weight.numpy(), TypeError, "weight: expected a torch.Tensor"),
        (5, lambda bias: bias.to("meta"), ValueError, "bias: expected device cpu"),
    ],
    ids=["dtype", "shape", "gates", "levels", "no list", "no tensor", "device"],
)
def test_a_bad_call_after_a_good_one_is_still_refused(position, change, error, message):
    arguments = list(operands(Shape()))
    for _ in range(2):
        focalnet.focal_modulation(*arguments)
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=message):
        focalnet.focal_modulation(*arguments)


def test_a_backend_that_cannot_run_the_call_is_refused_every_time():
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run focal_modulation here"):
            focalnet.focal_modulation(*operands(Shape()), backend="cuda")
    with focalnet.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        focalnet.focal_modulation(*operands(Shape()))


# ---- what observes operators ---------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def debug_log():
    logger = logging.getLogger("focalnet")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize(
    "observer",
    [
        Operators,
        Functions,
        forward_ad.dual_level,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["dispatch mode", "function mode", "forward-mode AD", "autocast"],
)
def test_where_something_observes_operators_the_operator_runs(observer, checked):
    arguments = operands(Shape())
    focalnet.focal_modulation(*arguments)
    with observer():
        focalnet.focal_modulation(*arguments)
    focalnet.focal_modulation(*arguments)
    assert checked == ["q", "q"]


@pytest.mark.parametrize(
    "watching",
    [debug_log, lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])],
    ids=["debug log", "profiler"],
)
def test_neither_a_profiler_nor_the_level_of_logging_changes_what_runs(watching, checked):
    arguments = operands(Shape())
    focalnet.focal_modulation(*arguments)
    with watching():
        focalnet.focal_modulation(*arguments)
    assert checked == ["q"]


def test_a_profile_shows_the_operator():
    arguments = operands(Shape())
    focalnet.focal_modulation(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        focalnet.focal_modulation(*arguments)
    assert "focalnet::focal_modulation" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("wanted", range(6))
def test_gradients_are_recorded_after_calls_that_needed_none(wanted, checked):
    arguments = list(operands(Shape()))
    focalnet.focal_modulation(*arguments)
    leaf = arguments[wanted][1] if wanted == 3 else arguments[wanted]
    leaf.requires_grad_()
    assert focalnet.focal_modulation(*arguments).grad_fn is not None
    with torch.no_grad():
        assert focalnet.focal_modulation(*arguments).grad_fn is None
    assert checked == ["q", "q"]


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [lambda q: q.as_subclass(Subclass), lambda q: torch.complex(q, -q).conj().imag],
    ids=["subclass", "negative view"],
)
def test_tensors_that_are_more_than_their_memory_go_through_the_operator(change, checked):
    q, *rest = operands(Shape())
    expected = focalnet.focal_modulation(q, *rest)
    assert torch.equal(focalnet.focal_modulation(change(q), *rest), expected)
    assert checked == ["q", "q"]


@pytest.mark.filterwarnings("ignore")
def test_traces_and_transformations_after_a_direct_call():
    q, *rest = operands(Shape())
    expected = focalnet.focal_modulation(q, *rest)
    traced = torch.jit.trace(lambda q: focalnet.focal_modulation(q, *rest), q)
    torch.testing.assert_close(traced(2 * q), 2 * expected)
    traced = torch.jit.trace(lambda q: focalnet.focal_modulation(q, *rest, backend="cpu"), q)
    assert "focalnet::focal_modulation" in str(traced.graph)
    mapped = torch.vmap(lambda q: focalnet.focal_modulation(q, *rest))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(mapped, torch.stack([expected, 2 * expected]))

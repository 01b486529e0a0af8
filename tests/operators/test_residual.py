"""The ends of residual branches as operators: what any PyTorch program may ask of one. Their kernels are tested in
tests/triton/test_residual.py; here, on a CPU, the operators run their specification.
"""

import pytest
import torch

from focalnet.fusion import gpu_block
from focalnet.models.layers import OURS
from focalnet.models.mlp import DropPath
from focalnet.operators import residual

OPS = torch.ops.focalnet
EPS = 1e-5
PARTS = ["", "gamma", "kept", "norm", "gamma kept norm"]


def operands(parts, shape=(3, 1, 1, 4), dtype=torch.float64):
    """hidden_state, update, gamma, kept, keep, weight, bias, eps; each tensor but ``kept`` asks for its gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, wanted=True):
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_() if wanted else None

    kept = torch.tensor([1, 0, 1], dtype=dtype).view(3, 1, 1, 1) if "kept" in parts else None
    dim, norm = shape[-1], "norm" in parts
    gamma = normal(dim, wanted="gamma" in parts)
    return [normal(*shape), normal(*shape), gamma, kept, 0.75, normal(dim, wanted=norm), normal(dim, wanted=norm), EPS]


def leaves(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def cases():
    for parts in PARTS:
        yield pytest.param(OPS.residual, residual.composed, operands(parts), (), id=f"residual, {parts}")
    for parts in PARTS[:3] + PARTS[4:]:
        arguments = operands(f"{parts} norm")
        yield pytest.param(
            OPS.residual_norm, residual.composed_norm, arguments, (torch.float64,), id=f"residual_norm, {parts}"
        )


CASES = pytest.mark.parametrize("operator, specification, arguments, rest", list(cases()))


@CASES
def test_values_and_gradients_are_those_of_the_specification(operator, specification, arguments, rest):
    def results(function):
        outs = function(*arguments, *rest)
        outs = outs if isinstance(outs, tuple) else (outs,)
        douts = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outs]
        return [*outs, *torch.autograd.grad(outs, leaves(arguments), douts)]

    for mine, expected in zip(results(operator), results(specification), strict=True):
        torch.testing.assert_close(mine, expected)


@CASES
def test_gradients_and_gradients_of_gradients(operator, specification, arguments, rest):
    positions = [at for at, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*tensors):
        filled = list(arguments)
        for at, tensor in zip(positions, tensors, strict=True):
            filled[at] = tensor
        return operator(*filled, *rest)

    assert torch.autograd.gradcheck(function, leaves(arguments))
    assert torch.autograd.gradgradcheck(function, leaves(arguments))


@CASES
def test_opcheck(operator, specification, arguments, rest):
    torch.library.opcheck(operator, (*arguments, *rest))


def test_opcheck_of_the_backward_operators():
    hidden_state, update, *rest = [
        a.detach() if isinstance(a, torch.Tensor) else a for a in operands("gamma kept norm")
    ]
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OPS.residual_bwd, (hidden_state, update, *rest, torch.float64, mask))
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        arguments = (hidden_state, update, hidden_state, update, *rest, torch.float64, mask)
        torch.library.opcheck(OPS.residual_norm_bwd, arguments)


def test_a_branch_without_scale_or_norm_is_not_saved():
    hidden_state, update, _, kept, *_ = operands("kept")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        OPS.residual(hidden_state, update, None, kept, 0.75, None, None, EPS)
    assert saved == [kept.shape]


def test_stochastic_depth_draws_what_it_drew():
    """The mask by itself and the layer take the same numbers from the generator."""
    layer, x = DropPath(0.4).train(), torch.randn(64, 3, 2, 5)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    kept = layer.draw(x, x.dtype)
    assert torch.equal(x.div(0.6) * kept, expected)
    assert 0 < kept.mean() < 1
    assert layer.eval().draw(x, x.dtype) is None


def test_on_a_cpu_the_plain_path_runs():
    assert gpu_block.runner(None, OURS, torch.ones(1, 2, 2, 8)) == "not on backend cpu: it has no kernel for residual"

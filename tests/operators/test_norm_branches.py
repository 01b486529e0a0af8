"""LayerNorm with a linear layer or an MLP behind it, as the operators that training takes: what the modules are one by
one, in every value and gradient.
"""

import math

import pytest
import torch
from instruction_sets import threads
from torch import nn

from focalnet.fusion.norm_branches import norm_linear
from focalnet.models.mlp import FocalNetMlp
from focalnet.modules import FocalModulation
from focalnet.operators import norm_linear as linear_operator
from focalnet.operators import norm_mlp as mlp_operator

OPS = torch.ops.focalnet
EPS = 1e-5
SHAPES = [(2, 3, 5), (11,), (0, 4, 3), (1, 1, 1)]
LINEAR, MLP = "norm_linear", "norm_mlp"
GIVEN = "norm_mlp, given what the norm made"


def operands(name, leading=(2, 3, 5), dim=13, hidden_dim=29, norm=True, bias=True, dtype=torch.float64):
    """Arguments of an operator, in order; each tensor a leaf that asks for its gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0, wanted=True):
        return (scale * torch.randn(size, generator=generator)).to(dtype).requires_grad_() if wanted else None

    first = (normal(*leading, dim), normal(dim, wanted=norm), normal(dim, wanted=norm), EPS if norm else None)
    weights = (normal(hidden_dim, dim, scale=dim**-0.5), normal(hidden_dim, wanted=bias))
    if name == LINEAR:
        return (*first, *weights)
    return (*first, *weights, normal(dim, hidden_dim, scale=hidden_dim**-0.5), normal(dim, wanted=bias))


def cast(arguments, dtype):
    return [a.detach().to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]


def leaves(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def run(name, *arguments):
    if name == LINEAR:
        return OPS.norm_linear(*arguments)
    return OPS.norm_mlp(*arguments, given(*arguments) if name == GIVEN else None)[0]


def given(x, weight, bias, eps, *_):
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def composed(name, *arguments):
    return (linear_operator if name == LINEAR else mlp_operator).composed(*arguments)


def value_and_gradients(function, name, arguments):
    out = function(name, *arguments)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves(arguments), dout)]


CASES = pytest.mark.parametrize(
    "name, norm, bias",
    [
        (LINEAR, True, True),
        (LINEAR, True, False),
        (LINEAR, False, True),
        (MLP, True, True),
        (MLP, False, True),
        (MLP, True, False),
        (GIVEN, True, True),
    ],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", SHAPES, ids=str)
@pytest.mark.parametrize("widths", [(13, 29), (32, 80)], ids=str)
@CASES
def test_values_and_gradients_are_as_exact_as_those_of_the_modules(name, norm, bias, widths, leading, dtype):
    """The rule: at most twice the error against float64 that the modules make in this dtype, and one ulp."""
    low = cast(operands(name, leading, *widths, norm=norm, bias=bias), dtype)
    exact = value_and_gradients(composed, name, cast(low, torch.float64))
    theirs, ours = (value_and_gradients(function, name, low) for function in (composed, run))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.shape == c.shape
        assert a.dtype == dtype
        if c.numel():
            largest = c.abs().max().item()
            ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
            allowed = 2 * (b.double() - c).abs().max().item() + ulp
            assert (a.double() - c).abs().max().item() <= allowed


@CASES
def test_gradients_and_gradients_of_gradients(name, norm, bias):
    arguments = operands(name, (2, 3), 5, 7, norm, bias)
    positions = [at for at, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]

    def function(*tensors):
        filled = list(arguments)
        for at, tensor in zip(positions, tensors, strict=True):
            filled[at] = tensor
        return run(name, *filled)

    assert torch.autograd.gradcheck(function, leaves(arguments))
    assert torch.autograd.gradgradcheck(function, leaves(arguments))


@CASES
def test_opcheck(name, norm, bias):
    arguments = operands(name, norm=norm, bias=bias, dtype=torch.float32)
    if name == LINEAR:
        torch.library.opcheck(OPS.norm_linear, arguments)
    else:
        normed = given(*arguments).detach().requires_grad_() if name == GIVEN else None
        torch.library.opcheck(OPS.norm_mlp, (*arguments, normed))


@pytest.mark.parametrize("only", range(7))
def test_backward_computes_what_is_asked_for_and_nothing_else(only):
    x, *rest = cast(operands(MLP), torch.float32)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
    out, fc1 = OPS.norm_mlp(*arguments, None)
    dout = torch.randn_like(out)
    every = OPS.norm_mlp_bwd(dout, fc1, *arguments, [True] * 7)
    mask = [at == only for at in range(7)]
    one = OPS.norm_mlp_bwd(dout, fc1, *arguments, mask)
    for at, (gradient, expected) in enumerate(zip(one, every, strict=True)):
        assert torch.equal(gradient, expected) if at == only else gradient.shape == (0,)
    torch.library.opcheck(OPS.norm_mlp_bwd, (dout, fc1, *arguments, mask))
    if only < 5:
        operands_of_linear = operands(LINEAR, dtype=torch.float32)
        dout = torch.randn(2, 3, 5, 29)
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in operands_of_linear]
        torch.library.opcheck(OPS.norm_linear_bwd, (dout, *detached, mask[:5]))


def test_inputs_may_depend_on_each_other_in_gradients_of_gradients():
    """A norm's weight made from the input itself: its path counts once, not twice."""
    x, _, norm_bias, eps, weight, bias = operands(LINEAR, (3,), 4, 5)

    def double(function):
        out = function(LINEAR, x, x.mean(0), norm_bias, eps, weight, bias)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weight])

    for a, b in zip(double(run), double(composed), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [LINEAR, MLP])
def test_bits_do_not_depend_on_threads(name):
    arguments = operands(name, (700,), 48, 192, norm=False, dtype=torch.float32)  # PyTorch's norm depends on threads
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(value_and_gradients(run, name, arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- when the modules are called instead


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


def saved_shapes(function):
    shapes = []

    def remember(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        function()
    return shapes


def mlp(hidden_act="gelu", drop=0.0):
    import focalnet

    config = focalnet.FocalNetConfig(mlp_ratio=3, hidden_act=hidden_act, hidden_dropout_prob=drop)
    return FocalNetMlp(config, 8), nn.LayerNorm(8)


def is_one_operator(module, norm, x):
    """What the operator saves holds fc1's output once; modules save it, and its activation."""
    return [math.prod(shape) for shape in saved_shapes(lambda: module.of_normed(norm, x))].count(2 * 5 * 24) == 1


@pytest.mark.parametrize("hidden_act", ["relu", "gelu_new", "quick_gelu", "silu"])
def test_another_activation_is_the_one_that_runs(hidden_act):
    module, norm = mlp(hidden_act)
    x = torch.randn(2, 5, 8)
    expected = module.fc2(module.activation(module.fc1(norm(x))))
    torch.testing.assert_close(module.of_normed(norm, x), expected, rtol=0, atol=0)


def test_dropout_runs_in_training_only():
    module, norm = mlp(drop=0.5)
    x = torch.randn(2, 5, 8)
    assert (module.of_normed(norm, x) == 0).any()
    assert is_one_operator(module.eval(), norm.eval(), x)
    assert not (module.of_normed(norm, x) == 0).any()


CHANGES = {
    "hook": lambda m: m.register_forward_hook(lambda *_: CALLED.append("hook")),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: CALLED.append("pre-hook")),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: CALLED.append("backward hook")),
    "forward": lambda m: setattr(m, "forward", lambda x, f=m.forward: CALLED.append("forward") or f(x)),
}
CALLED = []


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("part", ["norm", "fc1", "activation", "fc2", "drop"])
def test_what_hangs_on_a_part_of_the_mlp_takes_effect(part, kind):
    module, norm = mlp()
    x = torch.randn(2, 5, 8, requires_grad=True)
    assert is_one_operator(module, norm, x)
    expected = module.of_normed(norm, x)
    CHANGES[kind](norm if part == "norm" else getattr(module, part))
    CALLED.clear()
    out = module.of_normed(norm, x)
    out.sum().backward()
    assert set(CALLED) == {kind}
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("part", ["norm", "projection_in", "projection_out", "layernorm"])
def test_what_hangs_on_a_part_of_the_modulation_takes_effect(part, kind):
    torch.manual_seed(0)
    modulation, norm = FocalModulation(8, use_post_layernorm_in_modulation=True), nn.LayerNorm(8)
    x = torch.randn(1, 4, 5, 8, requires_grad=True)
    expected = modulation.of_normed(norm, x)
    CHANGES[kind](norm if part == "norm" else getattr(modulation, part))
    CALLED.clear()
    out = modulation.of_normed(norm, x)
    out.sum().backward()
    assert set(CALLED) == {kind}
    torch.testing.assert_close(out, expected)


def test_subclasses_parametrisations_and_global_hooks_are_called():
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    before = Counting.calls
    norm_linear(norm, Counting(8, 4), x)
    assert Counting.calls == before + 1

    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    torch.testing.assert_close(norm_linear(norm, linear, x), linear(norm(x)), rtol=0, atol=0)

    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        norm_linear(norm, nn.Linear(8, 4), x)
    finally:
        handle.remove()
    assert seen == [nn.LayerNorm, nn.Linear]


def test_hooks_on_all_modules_see_every_part_of_a_block():
    import focalnet
    from focalnet.models.layers import FocalNetLayer

    layer = FocalNetLayer(
        focalnet.FocalNetConfig(embed_dim=8, depths=[1], focal_levels=[2], focal_windows=[3]), 0, 0.0
    )
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        layer(torch.randn(1, 4, 4, 8))
    finally:
        handle.remove()
    assert {layer.norm1, layer.modulation, layer.norm2, layer.mlp, layer.mlp.fc1, layer.mlp.activation} <= seen


def test_the_reference_backend_runs_the_modules():
    import focalnet

    module, norm = mlp()
    x = torch.randn(2, 5, 8)
    with focalnet.use_backend("reference"):
        assert not is_one_operator(module, norm, x)


# --- autocast, torch.compile, torch.func


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_saves_little_and_is_as_exact_as_the_modules(dtype):
    module, norm = mlp()
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    parameters = [*norm.parameters(), *module.parameters()]
    exact = module.double()._by_modules(norm.double()(x.double()))
    exact_gradients = torch.autograd.grad(exact.square().sum(), parameters)
    module.float(), norm.float()
    errors = []
    for function in (lambda: module.of_normed(norm, x), lambda: module._by_modules(norm(x))):
        with torch.autocast("cpu", torch.bfloat16):
            assert is_one_operator(module, norm, x)
            out = function()
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.float().square().sum(), parameters)
        pairs = zip([out, *gradients], [exact, *exact_gradients], strict=True)
        errors.append([((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps


def test_compiled_it_is_the_operator_with_the_same_gradients():
    module, norm = mlp()
    x = torch.randn(2, 5, 8)
    parameters = [*norm.parameters(), *module.parameters()]
    compiled = torch.compile(lambda x: module.of_normed(norm, x), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lambda x: module._by_modules(norm(x))):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    torch.testing.assert_close(results[0], results[1])


def test_exported_it_is_the_modules():
    """An exported program runs where focalnet is not installed, so far as that depends on these parts."""
    module, norm = mlp()
    model = nn.Sequential(norm, module)
    program = torch.export.export(model, (torch.randn(2, 5, 8),))
    assert not [n for n in program.graph.nodes if "focalnet" in str(n.target)]


def test_torch_func_transforms_it():
    module, norm = mlp()
    x = torch.randn(4, 5, 8)
    parameters = {"norm": dict(norm.named_parameters()), "mlp": dict(module.named_parameters())}

    def loss(parameters, x):
        def normed(x):
            return torch.func.functional_call(norm, parameters["norm"], (x,))

        return torch.func.functional_call(module, parameters["mlp"], (normed(x),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss(parameters, x).backward()
    torch.testing.assert_close(each["mlp"]["fc1.weight"].sum(0), module.fc1.weight.grad)
    torch.testing.assert_close(each["norm"]["weight"].sum(0), norm.weight.grad)

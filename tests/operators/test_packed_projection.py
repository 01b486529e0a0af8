"""The projection of a GPU's modulation: rows begin at multiples of 16 elements, and its gradient is one tensor.

No GPU is needed: here a CPU is told to pad, and the specification or the CPU's kernels stand for those of a GPU.
"""

import functools
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from focalnet.kernels.padding import ROW_ELEMENTS
from operands import SHAPES, Shape, operands
from rule import assert_within_rule
from small_models import theirs
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet
from focalnet import modules as modules_of_focalnet
from focalnet.backends import registry
from focalnet.fusion import norm_branches
from focalnet.operators import norm_linear
from focalnet.operators.norm_linear import padded_empty, padded_linear

OPS = torch.ops.focalnet
BACKENDS = [name for name in ("reference", "cpu") if focalnet.backends()[name] is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def is_padded(tensor):
    return tensor.stride(-1) == 1 and tensor.stride(-2) % ROW_ELEMENTS == 0 and tensor.data_ptr() % 16 == 0


# ---- the product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [3, 16, 17, 195, 196])
def test_a_padded_product_is_the_product_in_longer_rows(features, bias):
    x, weight = torch.randn(2, 3, 5, 24, dtype=torch.float64), torch.randn(features, 24, dtype=torch.float64)
    bias = torch.randn(features, dtype=torch.float64) if bias else None
    padded = padded_linear(x, weight, bias)
    torch.testing.assert_close(padded, F.linear(x, weight, bias))
    assert is_padded(padded)
    assert padded.stride(-2) - features < ROW_ELEMENTS


@pytest.mark.parametrize("norm", [False, True])
def test_the_operator_has_the_gradients_of_the_product_and_the_strides_of_its_fake(norm):
    def leaf(*size, wanted=True):
        return torch.randn(size, dtype=torch.float64).requires_grad_() if wanted else None

    arguments = (
        leaf(2, 3, 5),
        leaf(5, wanted=norm),
        leaf(5, wanted=norm),
        1e-5 if norm else None,
        leaf(7, 5),
        leaf(7),
    )
    assert is_padded(OPS.norm_linear(*arguments, None, True))
    leaves = [a for a in arguments if isinstance(a, torch.Tensor)]

    def run(*tensors):
        given = iter(tensors)
        filled = [next(given) if isinstance(a, torch.Tensor) else a for a in arguments]
        return OPS.norm_linear(*filled, None, True)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    torch.library.opcheck(OPS.norm_linear, (*arguments, None, True))


# ---- the operator on one projection ---------------------------------------------------------------------------------


def packed(shape, dtype=torch.float32):
    """(projected, focal_weights, weight, bias), all leaves; the rows of the projection are padded."""
    q, ctx, gates, *weights = operands(shape, dtype)
    rows = torch.cat([q, ctx, gates], -1)
    focal_weights, weight, bias = weights
    leaves = [padded_empty(rows, rows.shape).copy_(rows), focal_weights, weight, bias]
    for leaf in flat(leaves):
        leaf.requires_grad_()
    return leaves


def flat(arguments):
    return [t for a in arguments for t in (a if isinstance(a, list) else [a]) if t is not None]


def of_three(projected, focal_weights, weight, *rest):
    channels = weight.shape[0]
    parts = projected.split([channels, channels, len(focal_weights) + 1], dim=-1)
    return OPS.focal_modulation(*parts, focal_weights, weight, *rest)


@each_backend
@each_shape
def test_it_is_the_operator_on_three_tensors_and_its_gradient_has_padded_rows(shape, backend):
    arguments = packed(shape)
    results = []
    for function in (OPS.packed_focal_modulation, of_three):
        out = function(*arguments, shape.normalize, backend)
        dout = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad(out, flat(arguments), dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert is_padded(results[0][1]) or not shape.batch


@pytest.mark.parametrize("asked", range(4), ids=["projection", "weight", "bias", "focal weights"])
@each_backend
def test_one_gradient_alone_is_the_same_and_nothing_else_is_made(asked, backend):
    projected, *rest = (a if isinstance(a, list) else a.detach() for a in packed(Shape()))
    rest[0] = [weight.detach() for weight in rest[0]]
    arguments = (torch.ones_like(projected[..., :8]), projected, *rest, False)
    together = OPS.packed_focal_modulation_bwd(*arguments, [True] * 4, backend)
    alone = OPS.packed_focal_modulation_bwd(*arguments, [at == asked for at in range(4)], backend)
    for at, (one, expected) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(one, expected) if min(at, 3) == asked else one.shape == (0,)


@pytest.mark.parametrize("shape", [Shape(1, 2, 3, 2, (3, 1), True), Shape(1, 3, 2, 1, (3,), bias=False)], ids=str)
def test_gradients_and_gradients_of_gradients(shape):
    projected, focal_weights, weight, bias = packed(shape, torch.float64)

    def run(projected, weight, bias, *focal_weights):
        return OPS.packed_focal_modulation(projected, list(focal_weights), weight, bias, shape.normalize, None)

    assert torch.autograd.gradcheck(run, (projected, weight, bias, *focal_weights))
    assert torch.autograd.gradgradcheck(run, (projected, weight, bias, *focal_weights), fast_mode=True)


@pytest.mark.parametrize("mask", [[True] * 4, [False, True, False, True]], ids=["all", "some"])
def test_opcheck(mask):
    arguments = packed(Shape())
    torch.library.opcheck(OPS.packed_focal_modulation, (*arguments, True, "reference"))
    projected, focal_weights, weight, bias = arguments
    detached = (projected.detach(), [w.detach() for w in focal_weights], weight.detach(), bias.detach())
    dout = torch.randn(projected[..., :8].shape)
    torch.library.opcheck(OPS.packed_focal_modulation_bwd, (dout, *detached, True, mask, "reference"))


# ---- rows that nobody copies ----------------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """A CPU's parameters get room, as those of a GPU do."""
    monkeypatch.setattr(modules_of_focalnet, "wants_room", lambda p: not norm_linear._has_room(p))


MOVES = {
    "made": lambda module: module,
    "cast": lambda module: module.bfloat16(),
    "from meta": lambda module: focalnet.FocalModulation(8).to("meta").to_empty(device="cpu"),
    "loaded": lambda module: module.load_state_dict(focalnet.FocalModulation(8).state_dict()) and module,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_product_of_a_module_reads_its_parameters_where_they_lie(move, padding, room):
    module = focalnet.FocalModulation(8)
    module = move(module) or module
    x = torch.randn(1, 2, 3, 8, dtype=module.projection_in.weight.dtype)
    with torch.no_grad(), Calls() as calls:
        assert is_padded(norm_branches.linear(module.projection_in, x, None, True))
    assert not calls.seen.keys() & set(COPIES)


def test_parameters_without_room_give_the_same_and_those_that_stay_keep_their_place(padding, room):
    module, x = focalnet.FocalModulation(8), torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        expected = module(x)
        module.load_state_dict(module.state_dict(), assign=True)
        tight = {name: p.clone() for name, p in module.state_dict().items()}
        module.load_state_dict(tight, assign=True)
        torch.testing.assert_close(module(x), expected)
        place = module.projection_in.weight.data_ptr()
        assert module.float().projection_in.weight.data_ptr() == place
        torch.testing.assert_close(module(x), expected)


def test_on_a_cpu_parameters_have_no_room(padding):
    """Nothing pads there, and their storages are of their size."""
    for parameter in focalnet.FocalModulation(8).float().parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_what_is_saved_has_the_published_shapes(tmp_path, room):
    module, other = focalnet.FocalModulation(8), focalnet.FocalModulation(8)
    for path, save, load in (
        (tmp_path / "a.pt", torch.save, torch.load),
        (tmp_path / "a.safetensors", safetensors.torch.save_file, safetensors.torch.load_file),
    ):
        save(module.state_dict(), path)
        other.load_state_dict(load(path))
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        assert other.projection_in.weight.shape == (2 * 8 + 2 + 1, 8)


# ---- who pads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("able", ["triton", "cuda"])
def test_rows_are_padded_where_a_backend_with_kernels_for_them_may_run(able, monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(registry, "_pads", registry._pads.__wrapped__)  # without its cache
    for name in ("triton", "cuda"):
        monkeypatch.setitem(registry._REGISTRY, name, replace(registry._REGISTRY[name], missing=lambda: "not here"))
    assert not registry.pads(cuda, torch.bfloat16, None)

    def accepts(problem):
        return None if problem.device.type == "cuda" else "no GPU"

    ready = replace(registry._REGISTRY[able], missing=lambda: None, accepts=accepts)
    monkeypatch.setitem(registry._REGISTRY, able, ready)
    assert registry.pads(cuda, torch.bfloat16, None)
    assert registry.pads(cuda, torch.bfloat16, able)
    assert not registry.pads(cpu, torch.bfloat16, None)
    assert not registry.pads(cuda, torch.bfloat16, "reference")
    with focalnet.use_backend("cpu"):
        assert not registry.pads(cuda, torch.bfloat16, None)


@pytest.fixture
def padding(monkeypatch):
    """Tells a CPU to pad, or not to."""

    def turn(on):
        monkeypatch.setattr(norm_branches, "pads", lambda *_: on)

    turn(True)
    return turn


class Calls(TorchDispatchMode):
    """Notes the operators that are called: name -> (arguments, result) of the last call."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen[function.overloadpacket._qualified_op_name] = (args, result)
        return result


COPIES = ("aten::cat", "aten::copy_", "aten::clone", "aten::contiguous")


def modules(run):
    return [run.func.__self__, *run.args] if isinstance(run, functools.partial) else [run]


def parameters(run):
    return {f"{at} {name}": p for at, module in enumerate(modules(run)) for name, p in module.named_parameters()}


def a_patched_modulation():
    modulation = theirs().focalnet.encoder.stages[0].layers[0].modulation
    focalnet.patch(modulation)
    return modulation


def a_normed_modulation(norm=None):
    """Called as in a block, with the norm before it."""
    modulation, norm = focalnet.FocalModulation(8), torch.nn.LayerNorm(8)
    return functools.partial(modulation.of_normed, norm)


MODULATIONS = {
    "ours": lambda: focalnet.FocalModulation(8),
    "normed": a_normed_modulation,
    "patched": a_patched_modulation,
}


@pytest.mark.parametrize("make", MODULATIONS.values(), ids=MODULATIONS)
def test_nothing_is_concatenated_or_copied_between_the_kernels_and_the_projections_gradients(make, padding):
    run, x = make(), torch.randn(2, 3, 5, 8, requires_grad=True)
    out = run(x)
    leaves, dout = [x, *parameters(run).values()], torch.randn_like(out)
    with Calls() as calls:
        torch.autograd.grad(out, leaves, dout)
    (dout_of_projection, *_), _ = calls.seen["focalnet::norm_linear_bwd"]
    _, (dprojected, *_) = calls.seen["focalnet::packed_focal_modulation_bwd"]
    assert dout_of_projection.data_ptr() == dprojected.data_ptr()
    assert is_padded(dout_of_projection)
    assert not calls.seen.keys() & set(COPIES)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_q_ctx_and_gates_of_a_module_can_be_read_16_bytes_at_a_time(levels, training, padding, monkeypatch):
    given = []
    specification = focalnet.reference.focal_modulation

    def recording(*arguments):
        given.extend(arguments[:3])
        return specification(*arguments)

    monkeypatch.setitem(registry._REGISTRY["reference"].operators, "focal_modulation", recording)
    module = focalnet.FocalModulation(24, focal_level=levels).bfloat16()
    with torch.set_grad_enabled(training), focalnet.use_backend("reference"):
        module(torch.randn(2, 3, 5, 24, dtype=torch.bfloat16))
    assert len(given) == 3
    assert all(map(is_padded, given))
    assert 2 * 24 + levels + 1 <= given[0].stride(-2) < 2 * 24 + levels + 1 + ROW_ELEMENTS


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_result_is_that_of_the_weights_as_they_are(training, padding):
    module, x = focalnet.FocalModulation(8), torch.randn(1, 3, 4, 8)
    kept = {name: (p.shape, p.data_ptr()) for name, p in module.state_dict().items()}
    with torch.set_grad_enabled(training):
        before = module(x)
        if training:
            before.sum().backward()
        module.projection_in.weight.data.mul_(2)
        module.projection_in.bias.data[-1] += 1
        after = module(x)
        padding(False)
        expected = module(x)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)
    assert {name: (p.shape, p.data_ptr()) for name, p in module.state_dict().items()} == kept
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize("make", MODULATIONS.values(), ids=MODULATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_padding_changes_no_value_and_no_gradient(dtype, make, padding):
    """The rule: against float64 at most twice the error without padding, and one ulp."""
    torch.manual_seed(0)
    run = make()
    low = torch.float32 if dtype == "autocast" else dtype
    x, dout = torch.randn(2, 2, 4, 5, 8).to(low)

    def results(kind, on):
        padding(on)
        for module in modules(run):
            module.to(kind)
        leaf = x.to(kind, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast" and kind == low):
            out = run(leaf)
        named = {"dx": leaf, **parameters(run)}
        gradients = torch.autograd.grad(out, list(named.values()), dout.to(out.dtype))
        return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}

    padded, plain = results(low, True), results(low, False)
    exact = results(torch.float64, False)
    assert padded.keys() == exact.keys()
    for name, value in padded.items():
        assert_within_rule(name, value, plain[name], exact[name])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_torch_compile_keeps_one_graph(training, padding):
    module, x = focalnet.FocalModulation(8), torch.randn(2, 3, 4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, module):
        module.zero_grad()
        with torch.set_grad_enabled(training):
            out = run(x)
        results.append([out.detach()])
        if training:
            out.square().sum().backward()
            results[-1] += [p.grad for p in module.parameters()]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def hooked(module):
    module.projection_in.register_forward_hook(lambda layer, inputs, out: 2 * out)


def replaced(module):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.projection_in.__class__ = Doubled


@pytest.mark.parametrize("change", [hooked, replaced])
def test_a_changed_projection_is_called_as_it_is(change, padding):
    module, x = focalnet.FocalModulation(8), torch.randn(1, 3, 4, 8)
    change(module)
    made = module(x)
    padding(False)
    assert torch.equal(made, module(x))


def test_exported_and_transformed_calls_do_not_pad(padding):
    module, x = focalnet.FocalModulation(8).eval(), torch.randn(1, 3, 4, 8)
    program = torch.export.export(module, (x,))
    assert "packed" not in str(program.graph) and "norm_linear" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))
    mapped = torch.func.vmap(lambda one: module(one[None])[0])(x)
    torch.testing.assert_close(mapped, module(x))


def test_between_padded_rows_on_a_cpu_lie_zeros():
    """A product of bfloat16 by oneDNN on AMX reads what lies there."""
    like = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(20):
        torch.full((64, 80), torch.nan, dtype=torch.bfloat16)  # freed at once: the next memory of this size is NaN
        made = padded_empty(like, (64, 68))
        assert made.stride() == (80, 1)
        assert not made.as_strided((64, 12), (80, 1), 68).any()

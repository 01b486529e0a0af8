"""focal_modulation and gated_aggregation: what they compute, and that PyTorch's transformations go through them."""

import functools
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from operands import SHAPES, Shape, independent, operands

import focalnet
from focalnet import reference
from focalnet.backends import registry

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
modulate = functools.partial(focalnet.focal_modulation, backend="reference")
aggregate = functools.partial(focalnet.gated_aggregation, backend="reference")


def published_modulation(q, ctx, gates, focal_weights, weight, bias, normalize):
    """The paper's equations as one would write them in NCHW, independent of focalnet.reference."""
    q, ctx, gates = (x.permute(0, 3, 1, 2) for x in (q, ctx, gates))
    total = torch.zeros_like(ctx)
    for level, kernel in enumerate(focal_weights):
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        ctx = F.gelu(F.conv2d(ctx.contiguous(), kernel, padding=padding, groups=kernel.shape[0]))
        total = total + ctx * gates[:, level : level + 1]
    total = total + F.gelu(ctx.mean(2, keepdim=True).mean(3, keepdim=True)) * gates[:, -1:]
    if normalize:
        total = total / (len(focal_weights) + 1)
    return (q * F.conv2d(total, weight[:, :, None, None], bias)).permute(0, 2, 3, 1)


@each_shape
def test_modulation_is_the_papers_equation(shape):
    arguments = operands(shape, torch.float64)
    out = modulate(*arguments, normalize_modulator=shape.normalize)
    torch.testing.assert_close(out, published_modulation(*arguments, shape.normalize), rtol=1e-12, atol=1e-12)
    assert out.is_contiguous() and out.shape == arguments[0].shape


@each_shape
def test_modulation_is_the_query_times_the_projected_aggregation(shape):
    q, ctx, gates, focal_weights, weight, bias = operands(shape, torch.float64)
    agg = aggregate(ctx, gates, focal_weights, normalize_modulator=shape.normalize)
    out = modulate(q, ctx, gates, focal_weights, weight, bias, normalize_modulator=shape.normalize)
    torch.testing.assert_close(out, q * F.linear(agg, weight, bias), rtol=1e-13, atol=1e-13)


@each_shape
def test_gradients_are_those_of_autograd_through_the_papers_equation(shape):
    ours, theirs = (independent(shape) for _ in range(2))
    dout = torch.randn(ours[0].shape, dtype=torch.float64)
    modulate(*ours, normalize_modulator=shape.normalize).backward(dout)
    published_modulation(*theirs, shape.normalize).backward(dout)
    for mine, expected in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.batch], ids=str)
def test_gradcheck_and_gradgradcheck(shape):
    small = Shape(1, min(shape.height, 3), min(shape.width, 3), min(shape.channels, 2), shape.kernels, shape.normalize)
    q, ctx, gates, focal_weights, weight, bias = independent(small)

    def modulation(q, ctx, gates, weight, bias, *focal_weights):
        return modulate(q, ctx, gates, list(focal_weights), weight, bias, normalize_modulator=small.normalize)

    def aggregation(ctx, gates, *focal_weights):
        return aggregate(ctx, gates, list(focal_weights), normalize_modulator=small.normalize)

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(modulation, (q, ctx, gates, weight, bias, *focal_weights), **fast)
    assert torch.autograd.gradcheck(aggregation, (ctx, gates, *focal_weights), **fast)
    assert torch.autograd.gradgradcheck(modulation, (q, ctx, gates, weight, bias, *focal_weights), **fast)
    assert torch.autograd.gradgradcheck(aggregation, (ctx, gates, *focal_weights), **fast)


@pytest.mark.parametrize("wanted", range(6), ids=["q", "ctx", "gates", "focal_weights", "weight", "bias"])
def test_backward_computes_only_the_gradients_that_are_asked_for(wanted, monkeypatch):
    masks = []
    specification = reference.focal_modulation_bwd

    def recording(*arguments):
        masks.append(list(arguments[-1]))
        return specification(*arguments)

    monkeypatch.setitem(registry._REGISTRY["reference"].operators, "focal_modulation_bwd", recording)
    full, partial = (list(independent(Shape())) for _ in range(2))
    for position, argument in enumerate(partial):
        for tensor in argument if isinstance(argument, list) else [argument]:
            tensor.requires_grad_(position == wanted)
    modulate(*full).sum().backward()
    modulate(*partial).sum().backward()
    # The mask's order is (q, ctx, gates, weight, bias, focal_weights).
    assert masks[1] == [i == [0, 1, 2, 5, 3, 4][wanted] for i in range(6)]
    for mine, expected in zip(flat(partial), flat(full), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, expected.grad)
        else:
            assert mine.grad is None


def test_the_specification_makes_the_modulator_as_one_product_in_both_directions(monkeypatch):
    """A convolution may return planes, as CUDA's own does. F.linear of planes is a product for every row of an image,
    whose short sums are more exact in float32: the rule would then compare two ways of adding up."""
    monkeypatch.setattr(reference, "conv2d", lambda *a, **options: F.conv2d(*a, **options).contiguous())
    linear, contiguous = F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, *rest: contiguous.append(x.is_contiguous()) or linear(x, *rest))
    q, *arguments = operands(Shape(2, 7, 7, 96, (3, 5)))
    reference.focal_modulation(q, *arguments)
    reference.focal_modulation_bwd(torch.ones(q.shape), q, *arguments, False, (True, *[False] * 5))
    assert contiguous == [True, True]


@pytest.mark.slow
@each_shape
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(shape, requires_grad):
    q, ctx, gates, focal_weights, weight, bias = independent(shape, torch.float32)
    if not requires_grad:
        q, ctx, gates, focal_weights, weight, bias = operands(shape)
    torch.library.opcheck(
        torch.ops.focalnet.focal_modulation,
        (q, ctx, gates, focal_weights, weight, bias, shape.normalize, "reference"),
        test_utils=OPCHECKS,
    )
    torch.library.opcheck(
        torch.ops.focalnet.gated_aggregation,
        (ctx, gates, focal_weights, shape.normalize, "reference"),
        test_utils=OPCHECKS,
    )


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("mask", [[True] * 6, [False, True, False, False, True, True]], ids=["all", "some"])
def test_opcheck_of_the_backward_operators(mask):
    q, ctx, gates, focal_weights, weight, bias = operands(Shape())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.focalnet.focal_modulation_bwd,
        (torch.randn(q.shape), q, ctx, gates, focal_weights, weight, bias, True, mask, "reference"),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.focalnet.gated_aggregation_bwd,
        (torch.randn(ctx.shape), ctx, gates, focal_weights, True, mask[1:4], "reference"),
        test_utils=checks,
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph_forward_and_backward(dynamic):
    compiled = torch.compile(focalnet.focal_modulation, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (Shape(), Shape(batch=3, height=6, width=4)):
        eager, graph = independent(shape, torch.float32), independent(shape, torch.float32)
        out, expected = compiled(*graph), focalnet.focal_modulation(*eager)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for mine, theirs in zip(flat(graph), flat(eager), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_compiles_as_one_graph_where_torch_cannot_trace_whether_a_device_has_autocast(monkeypatch):
    """As torch 2.10 and 2.11 cannot; with autocast on, off, and on a device that has none."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    torch.compiler.reset()
    compiled = torch.compile(focalnet.focal_modulation, fullgraph=True, backend="eager")
    arguments = operands(Shape())
    assert torch.equal(compiled(*arguments), focalnet.focal_modulation(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*arguments).dtype == torch.bfloat16
    assert compiled(*operands(Shape(), device="meta")).dtype == torch.float32


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled = torch.compile(focalnet.focal_modulation, fullgraph=True)
    arguments = operands(Shape())
    torch.testing.assert_close(compiled(*arguments), focalnet.focal_modulation(*arguments))


def test_exports():
    class Modulation(torch.nn.Module):
        def forward(self, q, ctx, gates, focal_weights, weight, bias):
            return focalnet.focal_modulation(q, ctx, gates, focal_weights, weight, bias)

    arguments = operands(Shape())
    program = torch.export.export(Modulation(), arguments)
    torch.testing.assert_close(program.module()(*arguments), focalnet.focal_modulation(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_pytorchs_own_operators_do(dtype):
    arguments = independent(Shape(), torch.float32)
    with torch.autocast("cpu", dtype):
        out = modulate(*arguments)
        agg = aggregate(arguments[1], arguments[2], arguments[3])
    assert out.dtype == agg.dtype == dtype
    low = operands(Shape(), dtype)
    torch.testing.assert_close(out, modulate(*low), rtol=0, atol=0)
    out.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in flat(arguments))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert modulate(*operands(Shape(), torch.float64)).dtype == torch.float64


def test_vmap_over_images():
    q, ctx, gates, *weights = operands(Shape(batch=6))
    mapped = torch.vmap(lambda q, ctx, gates: focalnet.focal_modulation(q, ctx, gates, *weights))
    groups = [x.unflatten(0, (3, 2)) for x in (q, ctx, gates)]
    torch.testing.assert_close(mapped(*groups).flatten(0, 1), modulate(q, ctx, gates, *weights))


def test_vmap_over_weights():
    q, ctx, gates, focal_weights, _, bias = operands(Shape())
    weights = torch.randn(3, 8, 8)
    mapped = torch.vmap(lambda w: focalnet.focal_modulation(q, ctx, gates, focal_weights, w, bias))(weights)
    for one, weight in zip(mapped, weights, strict=True):
        torch.testing.assert_close(one, modulate(q, ctx, gates, focal_weights, weight, bias))


def test_per_sample_gradients_by_torch_func():
    q, ctx, gates, focal_weights, weight, bias = operands(Shape(batch=3), torch.float64)

    def loss(weight, q, ctx, gates):
        images = (x[None] for x in (q, ctx, gates))
        return focalnet.focal_modulation(*images, focal_weights, weight, bias).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weight, q, ctx, gates)
    leaf = weight.clone().requires_grad_()
    for sample in range(3):
        (expected,) = torch.autograd.grad(loss(leaf, q[sample], ctx[sample], gates[sample]), leaf)
        torch.testing.assert_close(per_sample[sample], expected)


def test_forward_mode_by_torch_func():
    ctx, gates, focal_weights = operands(Shape(), torch.float64)[1:4]
    tangent = torch.randn_like(ctx)
    _, derivative = torch.func.jvp(lambda c: focalnet.gated_aggregation(c, gates, focal_weights), (ctx,), (tangent,))
    step = 1e-6
    above, below = (aggregate(ctx + sign * step * tangent, gates, focal_weights) for sign in (1, -1))
    torch.testing.assert_close(derivative, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


def test_torch_func_refuses_a_backend_it_cannot_transform():
    q, ctx, gates, *weights = operands(Shape())
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run inside a torch\.func transformation"):
        torch.vmap(lambda q: focalnet.focal_modulation(q, ctx, gates, *weights, backend="cpu"))(q[None])


def test_meta_tensors_have_shapes_and_gradients_without_data():
    arguments = [
        [t.detach().to("meta").requires_grad_() for t in a] if isinstance(a, list) else a.to("meta").requires_grad_()
        for a in operands(Shape())
    ]
    out = focalnet.focal_modulation(*arguments)
    assert out.is_meta and out.shape == arguments[0].shape
    grads = torch.autograd.grad(out.sum(), flat(arguments))
    assert [g.shape for g in grads] == [t.shape for t in flat(arguments)]


def test_views_of_any_strides_give_the_same_result():
    q, ctx, gates, *weights = operands(Shape())
    expected = modulate(q.contiguous(), ctx.contiguous(), gates.contiguous(), *weights)
    nchw = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in (q, ctx, gates)]
    flipped = [x.flip(1).contiguous().flip(1) for x in (q, ctx, gates)]
    for views in ((q, ctx, gates), nchw, flipped):
        torch.testing.assert_close(modulate(*views, *weights), expected)


def test_1x1_convolution_weights_are_taken_as_they_are():
    q, ctx, gates, focal_weights, weight, bias = operands(Shape())
    out = modulate(q, ctx, gates, focal_weights, weight[:, :, None, None], bias)
    torch.testing.assert_close(out, modulate(q, ctx, gates, focal_weights, weight, bias), rtol=0, atol=0)


def change(name, value):
    """One argument of a good call replaced by a bad one."""
    names = ("q", "ctx", "gates", "focal_weights", "weight", "bias")
    arguments = dict(zip(names, operands(Shape()), strict=True))
    arguments[name] = value(arguments[name])
    return arguments


BAD_ARGUMENTS = [
    ("q", lambda q: q[..., :4], ValueError, r"q: expected shape \(2, 5, 7, 8\), the shape of ctx, got \(2, 5, 7, 4\)"),
    ("q", lambda q: q.numpy(), TypeError, r"q: expected a torch.Tensor, got ndarray"),
    ("q", lambda q: q.int(), TypeError, r"q: expected a floating-point dtype, got torch.int32"),
    ("ctx", lambda c: c.double(), TypeError, r"ctx: expected torch.float32, the dtype of q, got torch.float64"),
    ("ctx", lambda c: c.to("meta"), ValueError, r"ctx: expected device cpu, that of q, got meta"),
    ("ctx", lambda c: c[0], ValueError, r"ctx: expected 4 dimensions \(B, H, W, C\), got 3"),
    ("ctx", lambda c: c[:, :0], ValueError, r"ctx: expected H, W and C of at least 1"),
    ("gates", lambda g: g[..., :2], ValueError, r"gates: expected shape \(2, 5, 7, 3\), .* got \(2, 5, 7, 2\)"),
    ("focal_weights", lambda f: [], ValueError, r"focal_weights: expected at least one level"),
    ("focal_weights", lambda f: f[0], TypeError, r"focal_weights: expected a list of tensors, .* got Tensor"),
    ("focal_weights", lambda f: [f[0][:4], f[1]], ValueError, r"focal_weights\[0\]: expected shape \(8, 1, kh, kw\)"),
    ("focal_weights", lambda f: [f[0], f[1][..., 1:]], ValueError, r"focal_weights\[1\]: expected odd kernel sizes"),
    ("weight", lambda w: w[:4], ValueError, r"weight: expected shape \(8, 8\) or \(8, 8, 1, 1\) .* got \(4, 8\)"),
    ("weight", lambda w: w.to_sparse_csr(), TypeError, "weight: expected a dense tensor, got layout torch.sparse_csr"),
    ("bias", lambda b: b[:4], ValueError, r"bias: expected shape \(8,\), .* got \(4,\)"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_anything_runs(name, value, error, message):
    with pytest.raises(error, match=message):
        focalnet.focal_modulation(**change(name, value))


def test_an_unknown_backend_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="backend: expected one of 'triton', 'cuda', 'cpu', 'reference', got 'tpu'"):
        focalnet.focal_modulation(*operands(Shape()), backend="tpu")


def test_a_backend_asked_for_that_cannot_run_says_why():
    for name, reason in focalnet.backends().items():
        if reason is not None:
            with pytest.raises(
                RuntimeError, match=re.escape(f"backend '{name}' cannot run focal_modulation here: {reason}")
            ):
                focalnet.focal_modulation(*operands(Shape()), backend=name)


def test_argument_wins_over_context_over_environment(monkeypatch):
    requested = registry.requested
    assert requested(None) is None
    monkeypatch.setenv("FOCALNET_BACKEND", "triton")
    assert requested(None) == "triton"
    with focalnet.use_backend("cuda"):
        assert requested(None) == "cuda"
        assert requested("reference") == "reference"
        with focalnet.use_backend("cpu"):
            assert requested(None) == "cpu"
        assert requested(None) == "cuda"
    assert requested(None) == "triton"
    monkeypatch.setenv("FOCALNET_BACKEND", "tpu")
    with pytest.raises(ValueError, match="the environment variable FOCALNET_BACKEND: expected one of"):
        focalnet.focal_modulation(*operands(Shape()))


def test_backward_keeps_the_backend_of_its_forward_on_any_thread(monkeypatch):
    used = []
    operators = registry._REGISTRY["reference"].operators
    specification = operators["focal_modulation_bwd"]
    monkeypatch.setitem(operators, "focal_modulation_bwd", lambda *a: used.append("reference") or specification(*a))
    arguments = independent(Shape())
    with focalnet.use_backend("reference"):
        out = focalnet.focal_modulation(*arguments)
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join(60)
    assert used == ["reference"] and arguments[0].grad is not None


def flat(arguments):
    return [t for a in arguments if a is not None for t in (a if isinstance(a, list) else [a])]

"""The ends of a block's residual branches as Triton kernels: compiled on a GPU, else run by Triton's interpreter.

The rule is that of test_gated_aggregation.py: an error against float64 is at most twice that of the specification in
the same precision, plus one unit in the last place.
"""

import contextlib
import contextvars
import copy
from dataclasses import replace

import pytest
import torch
from focalnet.kernels import plan
from focalnet.kernels.padding import ROW_ELEMENTS
from focalnet.kernels.plan import Device
from rule import assert_same_numbers, assert_within_rule
from small_models import SMALL, build

from focalnet.backends import registry, triton
from focalnet.backends.registry import use_backend
from focalnet.fusion import gpu_block
from focalnet.models.layers import OURS
from focalnet.operators import norm_linear, norm_mlp, residual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.focalnet
EPS = 1e-5


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """So few programs that each has several tiles of rows, the last one cut off."""
    monkeypatch.setattr(plan, "H100", Device(arch=90, sm_count=1, l2_bytes=50 * 2**20))
    monkeypatch.setattr(triton, "_row_plans", {})


@pytest.fixture(autouse=True)
def on_triton(request):
    """On a CPU the kernels run only where they are asked for. Tests of blocks ask for them by themselves."""
    if "fused" in request.fixturenames:
        yield
    else:
        with use_backend("triton"):
            yield


# ---- the operators against their specification ----------------------------------------------------------------------

# (B, H, W, C)
SHAPES = [(3, 2, 5, 8), (2, 3, 1, 13), (1, 1, 1, 96), (3, 1, 7, 352), (2, 1, 1, 2816), (3, 10, 5, 96), (2, 4, 3, 1)]
BRANCHES = ["gamma", "kept", "norm", "gamma kept", "kept norm", "gamma kept norm"]
LOW_PRECISION = [torch.bfloat16, torch.float16, "autocast"]


def normal(*size, scale=1.0):
    return scale * torch.randn(size, dtype=torch.float64)


def of(shape, parts, dtype):
    """hidden_state, update, gamma, kept, keep, weight, bias, eps in float64, rounded to the dtypes of a call."""
    torch.manual_seed(0)
    channels = shape[-1]
    low = torch.bfloat16 if dtype == "autocast" else dtype
    high = torch.float32 if dtype == "autocast" else dtype
    kept = torch.ones(shape[0], 1, 1, 1)
    kept[shape[0] // 2] = 0
    gamma = normal(channels).to(high) if "gamma" in parts else None
    update = normal(*shape).to(low)
    weight, bias = (normal(channels).to(high), normal(channels).to(high)) if "norm" in parts else (None, None)
    return [normal(*shape).to(high), update, gamma, kept.to(low) if "kept" in parts else None, 0.75, weight, bias, EPS]


def to(arguments, device, dtype=None):
    return [
        a.to(device, dtype or a.dtype).detach().requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


def values_and_gradients(function, arguments):
    """Outputs, then the gradients of all tensors but ``kept``, for gradients that are the same in every precision."""
    outs = function(*arguments)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.shape[-1] == outs[0].shape[-1]]
    leaves = [a for a in leaves if a.ndim < 4 or a.shape == arguments[0].shape]
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16) for o in outs]
    gradients = torch.autograd.grad(outs, leaves, [d.to(o.device, o.dtype) for d, o in zip(douts, outs, strict=True)])
    return [*outs, *gradients]


def assert_rule(run, specification, arguments):
    exact = values_and_gradients(specification, to(arguments, "cpu", torch.float64))
    rounded = values_and_gradients(specification, to(arguments, "cpu"))
    mine = values_and_gradients(run, to(arguments, DEVICE))
    for at, (m, r, e) in enumerate(zip(mine, rounded, exact, strict=True)):
        assert m.dtype == r.dtype and m.shape == e.shape, at
        if e.numel():
            ulp = torch.finfo(r.dtype).eps * e.abs().max()
            assert (m.cpu() - e).abs().max() <= 2 * (r - e).abs().max() + ulp, at


def kernels_that_run(monkeypatch):
    """The names of what runs on rows, as they come."""
    names, run = [], triton._run_rows
    monkeypatch.setattr(triton, "_run_rows", lambda name, *rest: names.append(name) or run(name, *rest))
    return names


CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[3], dtype) for dtype in LOW_PRECISION]


@pytest.mark.parametrize("parts", BRANCHES)
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_the_end_of_a_branch_obeys_the_rule(shape, dtype, parts, monkeypatch):
    ran = kernels_that_run(monkeypatch)
    assert_rule(OPS.residual, residual.composed, of(shape, parts, dtype))
    assert ran == ["residual", "residual_bwd"]


@pytest.mark.parametrize("parts", ["", "gamma", "kept", "gamma kept"])
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_the_end_of_a_branch_with_the_next_norm_obeys_the_rule(shape, dtype, parts, monkeypatch):
    ran = kernels_that_run(monkeypatch)
    norm_dtype = torch.bfloat16 if dtype == "autocast" else dtype
    assert_rule(
        lambda *arguments: OPS.residual_norm(*arguments, norm_dtype),
        # Of the specification in float64 everything stays in it.
        lambda *arguments: residual.composed_norm(
            *arguments, torch.float64 if arguments[0].dtype == torch.float64 else norm_dtype
        ),
        of(shape, f"{parts} norm", dtype),
    )
    assert ran == ["residual_norm", "residual_norm_bwd"]


@pytest.mark.parametrize("name", ["norm_linear", "norm_mlp"])
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_the_norm_of_which_the_input_was_saved_obeys_the_rule(shape, dtype, name, monkeypatch):
    ran = kernels_that_run(monkeypatch)
    hidden_state, _, _, _, _, weight, bias, eps = of(shape, "norm", dtype)
    low = torch.bfloat16 if dtype == "autocast" else dtype
    first = (normal(6, shape[-1], scale=shape[-1] ** -0.5).to(low), normal(6).to(low))
    second = (normal(shape[-1], 6).to(low), normal(shape[-1]).to(low)) if name == "norm_mlp" else ()
    run, specification = (
        (OPS.norm_linear, norm_linear.composed)
        if name == "norm_linear"
        else (lambda *arguments: OPS.norm_mlp(*arguments, None)[0], norm_mlp.composed)
    )
    values = [hidden_state, weight, bias, eps, *first, *second]

    def all_gradients(function, arguments):
        leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
        out = function(*arguments)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.device, out.dtype))]

    monkeypatch.setitem(assert_rule.__globals__, "values_and_gradients", all_gradients)
    assert_rule(run, specification, values)
    assert ran == ["layer_norm_bwd"]


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
@pytest.mark.parametrize("backend", ["reference", "cuda", "cpu"])
def test_no_kernel_runs_where_another_backend_is_asked_for(backend, how, monkeypatch):
    """Forward or backward, whichever way it is asked for; the operators are PyTorch's then."""
    ran = kernels_that_run(monkeypatch)
    asked = backend if how == "argument" else None
    if how == "environment":
        monkeypatch.setattr(registry, "_in_context", contextvars.ContextVar("nothing", default=None))
        monkeypatch.setenv("FOCALNET_BACKEND", backend)
    arguments = to(of((2, 3, 2, 8), "gamma kept norm", torch.float32), DEVICE)
    hidden_state, _, _, _, _, weight, bias, eps = arguments
    square = torch.eye(8, device=DEVICE)
    with use_backend(backend) if how == "context" else contextlib.nullcontext():
        out = OPS.residual(*arguments, asked)
        more, normed = OPS.residual_norm(*arguments, torch.float32, asked)
        linear = OPS.norm_linear(hidden_state, weight, bias, eps, square, None, asked)
        mlp, _ = OPS.norm_mlp(hidden_state, weight, bias, eps, square, None, square, None, None, asked)
    (out + more + normed + linear + mlp).sum().backward()
    assert ran == []


def test_an_empty_batch_has_gradients_of_zero():
    _, _, *rest = of((1, 1, 1, 8), "gamma norm", torch.float32)
    arguments = to([torch.empty(0, 3, 2, 8), torch.empty(0, 3, 2, 8), *rest], DEVICE)
    out, *gradients = values_and_gradients(OPS.residual, arguments)
    assert out.shape == (0, 3, 2, 8)
    assert [g.shape for g in gradients] == [(0, 3, 2, 8), (0, 3, 2, 8), (8,), (8,), (8,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("asked", range(3))
def test_one_gradient_alone_is_the_same_and_nothing_else_is_made(asked):
    arguments = of((2, 3, 2, 8), "gamma kept norm", torch.float32)
    mask = [at == asked for at in range(3)]
    for operator, inputs, outputs in (("residual_norm_bwd", 4, 3), ("residual_bwd", 2, 2)):
        every = gradients_of(operator, inputs, arguments, [True] * outputs, DEVICE, torch.float32)
        alone = gradients_of(operator, inputs, arguments, mask[:outputs], DEVICE, torch.float32)
        low, exact = (
            gradients_of(operator, inputs, arguments, [True] * outputs, "cpu", dtype, "reference")
            for dtype in (torch.float32, torch.float64)
        )
        for at, (one, *others) in enumerate(zip(alone, every, low, exact, strict=True)):
            if at == asked:
                assert_same_numbers(f"{operator} {at}", one, *others)
            else:
                assert not one.numel()


def gradients_of(operator, inputs, arguments, mask, device, dtype, backend=None):
    """What the backward makes of hidden_state and update, which stand for all its ``inputs`` of their shape."""
    hidden_state, update, *rest = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in to(arguments, device, dtype)
    )
    images = (hidden_state, update, update, update)[:inputs]
    return getattr(OPS, operator)(*images, *rest, dtype, mask, backend)


def test_the_same_bits_run_after_run_and_whatever_the_views():
    arguments = to(of((3, 4, 5, 8), "gamma kept norm", torch.float32), DEVICE)
    first, second = (values_and_gradients(OPS.residual, arguments) for _ in range(2))
    channels_first = [
        a.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if isinstance(a, torch.Tensor) and a.ndim == 4 else a
        for a in arguments
    ]
    third = values_and_gradients(OPS.residual, to(channels_first, DEVICE))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_torch_compile_keeps_one_graph():
    arguments = to(of((2, 3, 2, 8), "gamma kept norm", torch.float32), DEVICE)

    def both(*arguments):
        out, normed = OPS.residual_norm(*arguments, torch.float32)
        return OPS.residual(out, normed, *arguments[2:])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(both, arguments)
    assert all(torch.equal(a, b) for a, b in zip(values_and_gradients(compiled, arguments), expected, strict=True))


# ---- blocks and models ----------------------------------------------------------------------------------------------

VARIETIES = {
    "pre": SMALL,
    "pre, layer scale": {**SMALL, "use_layerscale": True, "layerscale_value": 0.5},
    "post": {**SMALL, "use_post_layernorm": True},
    "post, layer scale, norm in modulation": {
        **SMALL,
        "use_post_layernorm": True,
        "use_layerscale": True,
        "layerscale_value": 0.5,
        "use_post_layernorm_in_modulation": True,
    },
}
NAME = "FocalNetForImageClassification"


@pytest.fixture
def fused(monkeypatch):
    """Turns the kernels on and off. On a CPU they alone are interpreted; modulation and MLP run as ever."""

    def turn(on):
        monkeypatch.setattr(gpu_block, "requested", lambda _: "triton" if on else "reference")

    def as_ever(run):
        return lambda block, *operands: run(replace(block, backend=None), *operands)

    for name in ("_focal_modulation", "_mlp"):
        monkeypatch.setattr(gpu_block, name, as_ever(getattr(gpu_block, name)))
    return turn


def a_model(fields, dtype=torch.float32):
    import focalnet

    return build(focalnet, NAME, fields | {"drop_path_rate": 0.3}).to(DEVICE, dtype)


def images(dtype=torch.float32):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)


def step(model, dtype=torch.float32, autocast=False):
    """Logits, and all gradients by their names."""
    torch.manual_seed(3)
    # cuDNN would round the convolutions of float32 to TF32.
    with torch.backends.cudnn.flags(enabled=False):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logits = model(images(dtype)).logits
        model.zero_grad()
        (logits * torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits)).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def exact_step(model, monkeypatch):
    """In float64, with the random numbers that float32 draws."""
    draw = torch.rand
    with monkeypatch.context() as patched:
        patched.setattr(torch, "rand", lambda *size, dtype, **more: draw(*size, dtype=torch.float32, **more).to(dtype))
        return step(copy.deepcopy(model).double(), torch.float64)


def assert_step_within_rule(mine, rounded, exact):
    """Logits, and all gradients as one vector: some are 0 but for rounding."""
    results = mine, rounded, exact
    assert_within_rule("logits", *(one["logits"] for one in results))
    gradients = [torch.cat([one[name].flatten() for name in exact if name != "logits"]) for one in results]
    assert_within_rule("gradients", *gradients)


@pytest.mark.parametrize("name", VARIETIES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_model_is_what_its_modules_are_one_by_one(name, training, fused, monkeypatch):
    model = a_model(VARIETIES[name]).train(training)
    fused(False)
    exact, rounded = exact_step(model, monkeypatch), step(model)
    fused(True)
    ran = kernels_that_run(monkeypatch)
    assert_step_within_rule(step(model), rounded, exact)
    blocks = sum(SMALL["depths"])
    if name.startswith("post"):
        assert ran.count("residual") == ran.count("residual_bwd") == 2 * blocks
    else:
        assert ran.count("residual_norm") == ran.count("residual_norm_bwd") == blocks
        # Without layer scale and stochastic depth the second sum is a plain one.
        assert ran.count("residual") == (blocks if "scale" in name else 3 if training else 0)


@pytest.mark.parametrize("name", VARIETIES)
def test_inference_is_what_the_modules_are_one_by_one(name, fused, monkeypatch):
    model = a_model(VARIETIES[name])
    monkeypatch.setattr("focalnet.models.modeling.why_not_call", lambda _: "not now")
    monkeypatch.setattr("focalnet.models.layers.why_not_call", lambda _: "not now")
    monkeypatch.setattr("focalnet.fusion.cpu_block.why_not_call", lambda _: "not now")
    ran = kernels_that_run(monkeypatch)
    results = []
    for on in (False, True):
        fused(on)
        with torch.inference_mode():
            results.append(model(images()).logits)
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[0].abs().max()
    assert len(ran) == (4 if name == "pre" else 8)


def test_a_seeded_step_draws_what_the_modules_draw(fused):
    """The generator stands where it would, so that what is drawn later is the same as well."""
    model, states = a_model(VARIETIES["pre"]).train(), []
    for on in (False, True):
        fused(on)
        step(model)
        states.append(torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", VARIETIES)
def test_bfloat16_and_autocast_obey_the_rule(name, fused):
    model = a_model(VARIETIES[name])
    fused(False)
    exact = step(copy.deepcopy(model).double(), torch.float64)
    for autocast in (False, True):
        low = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(torch.bfloat16)
        dtype = torch.float32 if autocast else torch.bfloat16
        errors = []
        for on in (False, True):
            fused(on)
            made = step(low, dtype, autocast)
            assert made["logits"].dtype == torch.bfloat16
            total = sum((made[key].double() - e).square().sum() for key, e in exact.items())
            errors.append(total.sqrt())
        assert errors[1] <= 2 * errors[0]


def hooked(block):
    block.norm2.register_forward_hook(lambda module, inputs, out: 2 * out)


def with_a_norm_of_its_own(block):
    block.norm2 = torch.nn.Sequential(block.norm2)


def with_a_scale_for_every_position(block):
    block.gamma_1 = torch.nn.Parameter(torch.full((4, 4, 1), 0.5, device=DEVICE))


def with_a_drop_path_of_its_own(block):
    block.drop_path = torch.nn.Sequential(block.drop_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        (hooked, "norm2 is LayerNorm, or was wrapped or hooked"),
        (with_a_norm_of_its_own, "norm2 is Sequential, or was wrapped or hooked"),
        (with_a_scale_for_every_position, "a layer scale does not have one value for each channel"),
        (with_a_drop_path_of_its_own, "drop_path is Sequential, or was wrapped or hooked"),
    ],
)
def test_a_changed_block_runs_module_by_module(change, reason, fused):
    block = a_model(VARIETIES["pre, layer scale"]).focalnet.encoder.stages[1].layers[0]
    x = torch.randn(2, 4, 4, 16, device=DEVICE)
    fused(True)
    assert not isinstance(gpu_block.runner(block, OURS, x), str)
    unchanged = block(x)
    change(block)
    assert gpu_block.runner(block, OURS, x).startswith(reason)
    changed = block(x)
    fused(False)
    assert torch.equal(changed, block(x))
    assert change is with_a_norm_of_its_own or change is with_a_drop_path_of_its_own or (changed != unchanged).any()


def test_a_changed_mlp_or_modulation_is_called_as_it_is(fused):
    block = a_model(VARIETIES["pre"]).focalnet.encoder.stages[1].layers[0].train()
    block.drop_path.drop_prob = 0.0
    seen = []
    block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    block.modulation.register_forward_hook(lambda module, inputs, out: 2 * out)
    x = torch.randn(2, 4, 4, 16, device=DEVICE)
    results = []
    for on in (False, True):
        fused(on)
        results.append(block(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)


def test_nothing_is_saved_but_the_rows_themselves(fused):
    """For backward of a block before the norms: bytes by the plain path, of which the statistics go, and what pads the
    rows of the projection."""

    def saved(block, x):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x)
        return sum(storages.values())

    block = a_model(VARIETIES["pre"]).focalnet.encoder.stages[1].layers[0].train()
    block.drop_path.drop_prob = 0.0
    x = torch.randn(2, 9, 9, 16, device=DEVICE, requires_grad=True)
    fused(False)
    plain = saved(block, x)
    fused(True)
    features = block.modulation.projection_in.out_features
    padding = -features % ROW_ELEMENTS * x[..., 0].numel() * x.itemsize
    assert saved(block, x) <= plain + padding


def test_on_a_cpu_the_kernels_run_only_if_asked_for(fused):
    block = a_model(VARIETIES["pre"]).focalnet.encoder.stages[1].layers[0]
    if DEVICE == "cpu":
        assert (
            gpu_block.runner(block, OURS, torch.ones(1, 2, 2, 16))
            == "not on backend cpu: it has no kernel for residual"
        )
    for backend in ("cuda", "cpu", "reference"):
        reason = gpu_block.runner(block, OURS, torch.ones(1, 2, 2, 16, device=DEVICE), backend)
        assert isinstance(reason, str) and backend in reason

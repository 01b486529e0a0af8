"""focalnet.patch on the FocalNets that exist: the same outputs and gradients, and back again without a trace."""

import copy
import io
import logging
import pickle

import pytest
import torch
from golden import MODELS, input_of, tensors_of
from small_models import (
    CLASSES,
    EVERY_OPTION,
    SMALL,
    assert_equal,
    build,
    images,
    modulations,
    one_thread,  # noqa: F401
    tensors,
    theirs,
)
from sources import AuthorsModulation, TimmModulation, XDecoderBlock, golden_model
from torch import nn

import focalnet

VARIETIES = {"defaults": SMALL, "every option": EVERY_OPTION, "exact GELU": {**EVERY_OPTION, "hidden_act": "gelu"}}


def run(model, inputs):
    """(outputs, gradients of the input and of every parameter) of a scalar that every output counts in."""
    x = inputs.clone().requires_grad_()
    model.zero_grad()
    outputs = tensors(model(x))
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t).to(t)).sum() for t in outputs).backward()
    return outputs, [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def largest_difference(actual, expected):
    assert [x.shape for x in actual] == [x.shape for x in expected]
    return max((x - y).abs().max().item() for x, y in zip(actual, expected, strict=True))


def largest(values):
    return max(x.abs().max().item() for x in values)


# --- the rebuilt sources are right


@pytest.mark.parametrize("name", MODELS)
def test_a_rebuilt_source_and_its_patched_self_compute_what_the_published_code_did(name):
    model = golden_model(name)
    report = focalnet.patch(copy.deepcopy(model))
    assert set(modulations(model)) <= set(report.replaced)
    for candidate in (model, copy.deepcopy(model)):
        if candidate is not model:
            focalnet.patch(candidate)
        with torch.no_grad():
            outputs = candidate(input_of(name))
        expected = tensors_of(name, "output")
        assert_equal(
            outputs if isinstance(outputs, tuple) else (outputs,), [expected[str(i)] for i in range(len(expected))]
        )


# --- outputs and gradients


@pytest.mark.parametrize("name", MODELS)
def test_patched_and_unpatched_networks_agree(name):
    """Gradients in float64: in float32 these random networks amplify rounding in any implementation."""
    original = golden_model(name)
    patched = copy.deepcopy(original)
    focalnet.patch(patched)
    with torch.no_grad():
        assert_equal(patched(input_of(name)), original(input_of(name)))
    results = [run(model.double(), input_of(name).double()) for model in (patched, original)]
    for actual, expected in zip(*results, strict=True):
        assert largest_difference(actual, expected) <= 1e-11 * largest(expected)


@pytest.mark.parametrize("name", MODELS)
def test_patched_and_unpatched_modules_agree_in_float32(name):
    original = golden_model(name)
    patched = copy.deepcopy(original)
    focalnet.patch(patched)
    for key, module in modulations(original).items():
        shape = (2, 7, 9, module.h.in_channels)
        x = torch.randn(*shape) if isinstance(module.f, nn.Linear) else torch.randn(*shape).permute(0, 3, 1, 2)
        for actual, expected in zip(run(patched.get_submodule(key), x), run(module, x), strict=True):
            assert largest_difference(actual, expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize("fields", VARIETIES.values(), ids=VARIETIES)
@pytest.mark.parametrize("name", CLASSES)
def test_patched_transformers_models_agree(name, fields):
    original = theirs(fields, name)
    patched = copy.deepcopy(original)
    report = focalnet.patch(patched)
    assert {entry.source for entry in report.entries} == {"transformers"}
    assert set(modulations(original)) <= set(report.replaced)
    sizes = [(32, 32)] if name == "FocalNetForMaskedImageModeling" else [(32, 32), (29, 50)]
    for size in sizes:
        with torch.no_grad():
            assert_equal(patched(images(*size)), original(images(*size)))
        (outputs, gradients), (expected, expected_gradients) = (run(m, images(*size)) for m in (patched, original))
        assert_equal(outputs, expected)
        assert largest_difference(gradients, expected_gradients) <= 1e-5 * largest(expected_gradients)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_draws_the_same_random_numbers(drop_path):
    fields = {**SMALL, "hidden_dropout_prob": 0.3, "drop_path_rate": drop_path}
    original = theirs(fields).train()
    patched = copy.deepcopy(original)
    focalnet.patch(patched)
    outputs = []
    for model in (patched, original):
        torch.manual_seed(1)
        outputs.append(model(images()).logits)
    assert_equal(*outputs)


# --- what is recognised, and what is left alone


class SigmoidGates(AuthorsModulation):
    """As some published variants do."""

    def gates_of(self, gates):
        return gates.sigmoid()


class Masked(AuthorsModulation):
    def forward(self, x, mask):
        return super().forward(x * mask)


class Twice(AuthorsModulation):
    def forward(self, x):
        return super().forward(x), x


def rectangular():
    module = AuthorsModulation(8)
    module.focal_layers[1][0] = nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8, bias=False)
    return module


def changed(name, part):
    module = AuthorsModulation(8)
    *path, last = name.split(".")
    module.get_submodule(".".join(path)).register_module(last, part)
    return module


def conv(*args, **kwargs):
    return nn.Conv2d(8, 8, *args, **{"groups": 8, "bias": False, **kwargs})


UNKNOWN = {
    "rectangular": (rectangular, "focal_layers.1.0 has a rectangular kernel, 3 x 5"),
    "even": (lambda: changed("focal_layers.0.0", conv(4, padding=2)), "a kernel of 4 and a padding of"),
    "dilated": (lambda: changed("focal_layers.0.0", conv(3, padding=1, dilation=2)), "dilation or padding mode"),
    "dense": (lambda: changed("focal_layers.0.0", conv(3, padding=1, groups=1)), "not a depthwise convolution"),
    "tanh GELU": (lambda: changed("focal_layers.0.1", nn.GELU(approximate="tanh")), "not the exact GELU"),
    "ReLU": (lambda: changed("act", nn.ReLU()), "act is ReLU(), not the exact GELU"),
    "wide context": (lambda: changed("h", nn.Conv2d(8, 8, 3, padding=1)), "not a 1x1 convolution"),
    "more parts": (lambda: changed("extra", nn.Linear(8, 8)), "it also has extra"),
    "other parts": (lambda: nn.ModuleDict({"focal_layers": nn.ModuleList()}), "it has other parts"),
    "sigmoid": (lambda: SigmoidGates(8), "its own forward computes something else"),
    "mask": (lambda: Masked(8), "its own forward does not take a map alone"),
    "two outputs": (lambda: Twice(8), "its own forward returns something else"),
}


@pytest.mark.parametrize("make, reason", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_focal_modulation_is_left_alone_and_the_report_says_why(make, reason, caplog):
    model = nn.Sequential(make())
    before = dict(model[0].__dict__)
    with caplog.at_level(logging.WARNING, "focalnet"):
        report = focalnet.patch(model)
    assert reason in report.left["0"] and not report.replaced
    assert "replaced nothing" in caplog.text
    assert model[0].__dict__ == before
    assert reason.split()[0] in str(report)


def test_known_and_unknown_modules_side_by_side():
    model = nn.Sequential(AuthorsModulation(8), rectangular(), TimmModulation(8))
    report = focalnet.patch(model)
    assert report.replaced == ("0", "2")
    assert [(e.name, e.source) for e in report.entries] == [("0", "authors"), ("1", "authors"), ("2", "timm")]
    assert "2 replaced, 1 left alone" in str(report)


@pytest.mark.parametrize("flag", ["normalize_modulator", "scaling_modulator"])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalised"])
def test_segmentation_modules_of_xdecoder_and_seem(flag, normalize):
    original = XDecoderBlock(8, AuthorsModulation(8, 3, 3, postln=True, normalize=normalize, flag=flag), postln=True)
    original.H, original.W = 6, 7
    patched = copy.deepcopy(original)
    assert focalnet.patch(patched).replaced == ("modulation",)
    x = torch.randn(2, 42, 8)
    for actual, expected in zip(*(run(m, x) for m in (patched, original)), strict=True):
        assert largest_difference(actual, expected) <= 1e-5 * largest(expected)


def test_models_that_cannot_be_patched_say_why():
    with pytest.raises(ValueError, match=r"expected a model with focal modulation, but none of the 2 modules of this"):
        focalnet.patch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        focalnet.patch("microsoft/focalnet-tiny")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        focalnet.unpatch("microsoft/focalnet-tiny")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'fast'"):
        focalnet.patch(AuthorsModulation(8), backend="fast")


def test_our_own_models_need_no_patch():
    model = build(focalnet, "FocalNetModel", SMALL)
    report = focalnet.patch(model)
    assert set(report.left.values()) == {"it is focalnet's own"}
    assert "forward" not in model.encoder.stages[0].layers[0].modulation.__dict__


# --- nothing but forward changes, and that comes back


def everything(model):
    """All there is to a model: of each module its class and attributes, of each parameter its identity and values."""
    attributes = {name: (type(m), dict(m.__dict__), dict(m._parameters)) for name, m in model.named_modules()}
    return attributes, {k: (id(p), p.clone()) for k, p in model.named_parameters()}


def forget_kept(model):
    for module in modulations(model).values():
        for name in ("gates", "modulator"):
            module.__dict__.pop(name, None)


@pytest.mark.parametrize("make", [theirs, lambda: golden_model("ms_large_fl3"), lambda: golden_model("timm_srf")])
def test_patching_changes_forward_alone_and_unpatching_restores_it(make):
    model = make()
    seen = []
    for module in modulations(model).values():
        module.register_forward_hook(lambda *_: seen.append(1))
    model(images())  # the authors' blocks remember the size of the map
    forget_kept(model)
    attributes, parameters = everything(model)
    keys, random_state = list(model.state_dict()), torch.get_rng_state()

    replaced = focalnet.patch(model).replaced
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.state_dict()) == keys
    for key, parameter in model.named_parameters():
        assert id(parameter) == parameters[key][0] and torch.equal(parameter, parameters[key][1])
    for name, (kind, attribute, own_parameters) in attributes.items():
        module = model.get_submodule(name)
        assert type(module) is kind and module._parameters == own_parameters
        assert {k: v for k, v in module.__dict__.items() if k != "forward"} == attribute
        assert ("forward" in module.__dict__) == (name in replaced)
    model(images())
    assert len(seen) == 2 * len(modulations(model))

    assert focalnet.unpatch(model) == replaced
    assert everything(model)[0] == attributes
    assert focalnet.unpatch(model) == ()


def test_patching_twice_is_harmless_and_the_last_settings_count():
    model = theirs()
    first = focalnet.patch(model)
    assert focalnet.patch(model, backend="reference").entries == first.entries
    forward = next(iter(modulations(model).values())).forward
    assert forward.keywords["backend"] == "reference"
    focalnet.unpatch(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_forward_that_something_else_replaced_is_left_alone():
    model = theirs()
    modulation = model.focalnet.encoder.stages[0].layers[0].modulation
    modulation.forward = forward = modulation.forward
    report = focalnet.patch(model)
    name = "focalnet.encoder.stages.0.layers.0.modulation"
    assert report.left[name] == "its forward was replaced by something else"
    focalnet.unpatch(model)
    assert modulation.forward is forward


def test_a_scripted_model_is_left_alone():
    traced = torch.jit.trace(AuthorsModulation(8).eval(), torch.randn(1, 4, 4, 8))
    assert "TorchScript" in next(iter(focalnet.patch(nn.Sequential(traced)).left.values()))


# --- copies, pickles, hooks, settings


@pytest.mark.parametrize("make", [theirs, lambda: golden_model("ms_srf"), lambda: golden_model("timm_srf")])
def test_copies_and_pickles_of_a_patched_model_are_patched_models_of_their_own(make):
    model = make()
    focalnet.patch(model)
    with torch.no_grad():
        expected = model(images())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for other in copies:
        with torch.no_grad():
            assert_equal(other(images()), expected)
            for parameter in other.parameters():
                parameter.zero_()
            assert tensors_are_zero(other(images()))
        assert len(focalnet.unpatch(other)) == len(focalnet.patch(model).replaced)
    with torch.no_grad():
        assert_equal(model(images()), expected)


def tensors_are_zero(outputs):
    return not largest(tensors(outputs))


def test_a_changed_convolution_goes_through_the_modules_own_forward():
    original, patched = (AuthorsModulation(8).eval() for _ in range(2))
    patched.load_state_dict(original.state_dict())
    focalnet.patch(patched)
    for module in (original, patched):
        module.focal_layers[0][0].register_forward_hook(lambda _, __, output: 2 * output)
    x = torch.randn(2, 5, 6, 8)
    with torch.no_grad():
        assert_equal(patched(x), original(x))
    focalnet.patch(patched, backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this AuthorsModulation: focal_layers\.0\.0 was"):
        patched(x)


def test_the_backend_that_was_asked_for_runs():
    model = AuthorsModulation(8)
    focalnet.patch(model, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run focal_modulation here"):
        model(torch.randn(1, 4, 4, 8))
    focalnet.patch(model, backend="reference")
    model(torch.randn(1, 4, 4, 8))


@pytest.mark.parametrize("make", [lambda: AuthorsModulation(8, 3, 3, normalize=True), lambda: TimmModulation(8, 3, 3)])
def test_gates_and_modulator_are_kept_on_request_alone(make):
    module = make()
    x = torch.randn(2, 8, 5, 6) if isinstance(module, TimmModulation) else torch.randn(2, 5, 6, 8)
    expected = module(x)
    theirs = [getattr(module, name, None) for name in ("gates", "modulator")]
    focalnet.patch(module)
    module(x)
    assert not hasattr(module, "gates") and not hasattr(module, "modulator")
    focalnet.patch(module, keep_modulator=True)
    assert_equal(module(x), expected)
    assert module.gates.shape == (2, 4, 5, 6) and module.modulator.shape == (2, 8, 5, 6)
    if theirs[0] is not None:
        assert_equal([module.gates, module.modulator], theirs)

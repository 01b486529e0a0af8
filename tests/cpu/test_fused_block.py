"""The block as one operator in inference: when it runs, and the same numbers as its modules.

test_weights_as_they_are.py has the ways to write weights.
"""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers
from small_models import EVERY_OPTION, SMALL, build, images, one_thread  # noqa: F401

import focalnet
from focalnet.backends import registry
from focalnet.fusion import cpu_block
from focalnet.models.layers import OURS

pytestmark = pytest.mark.skipif(
    focalnet.backends()["cpu"] is not None, reason=f"no compiled extension: {focalnet.backends()['cpu']}"
)
NAME = "FocalNetForImageClassification"
GELU = {"hidden_act": "gelu"}
VARIETIES = [
    SMALL,
    {**EVERY_OPTION, **GELU},
    {**SMALL, "use_post_layernorm": True},
    {**SMALL, "use_layerscale": True, "layerscale_value": 0.5},
    {**SMALL, "use_post_layernorm_in_modulation": True, "normalize_modulator": True},
]


def a_block(fields=SMALL, stage=1):
    return build(focalnet, NAME, fields).focalnet.encoder.stages[stage].layers[0]


def reason(layer, hidden_state):
    """Why the operator cannot take a call, or None."""
    with torch.no_grad():
        run = cpu_block.runner(layer, OURS, hidden_state)
    return run if isinstance(run, str) else None


def outputs(layer, hidden_state):
    """(by the operator, by the modules)."""
    assert reason(layer, hidden_state) is None
    with torch.no_grad():
        fused = layer(hidden_state)
        with focalnet.use_backend("reference"):
            return fused, layer(hidden_state)


@pytest.fixture
def fused_calls(monkeypatch):
    """One entry for every block that ran as one operator."""
    calls, operator = [], registry._REGISTRY["cpu"].operators["block"]
    counting = lambda *arguments: calls.append(1) or operator(*arguments)  # noqa: E731
    monkeypatch.setitem(registry._REGISTRY["cpu"].operators, "block", counting)
    return calls


@pytest.mark.parametrize("fields", VARIETIES, ids=["pre", "every option", "post", "layer scale", "modulation"])
def test_a_models_outputs_are_those_of_transformers(fields, fused_calls):
    ours, theirs = (build(library, NAME, fields) for library in (focalnet, transformers))
    for size in ((32, 32), (29, 50)):
        with torch.inference_mode():
            mine, expected = (model(images(*size), output_hidden_states=True) for model in (ours, theirs))
        assert len(fused_calls) == sum(fields["depths"])
        fused_calls.clear()
        for a, b in zip((mine.logits, *mine.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def in_place(layer):
    with torch.no_grad():
        layer.mlp.fc1.weight.mul_(1.5)


def by_replacing_a_parameter(layer):
    layer.norm1.weight = torch.nn.Parameter(1.5 * layer.norm1.weight.detach())


def by_replacing_a_module(layer):
    layer.mlp.fc2 = torch.nn.Linear(64, 16)


def by_data(layer):
    layer.mlp.fc1.weight.data.mul_(1.5)


def by_a_setting(layer):
    layer.modulation.normalize_modulator = True


def by_a_setting_of_the_block(layer):
    layer.use_post_layernorm = True


def by_a_first_layer_scale(layer):
    layer.gamma_1 = torch.nn.Parameter(torch.full((16,), 3.0))


def by_an_eps(layer):
    layer.norm2.eps = 0.5


CHANGES = [in_place, by_data, by_replacing_a_parameter, by_replacing_a_module, by_an_eps]
CHANGES += [by_a_setting, by_a_setting_of_the_block, by_a_first_layer_scale]


@pytest.mark.parametrize("change", CHANGES)
def test_the_operator_sees_what_changed(change):
    layer, hidden_state = a_block(), torch.randn(1, 5, 6, 16)
    before, _ = outputs(layer, hidden_state)
    change(layer)
    fused, by_modules = outputs(layer, hidden_state)
    largest = by_modules.abs().max()
    assert (fused - by_modules).abs().max() <= 1e-5 * largest
    assert (fused - before).abs().max() > 1e-4 * largest


def test_copies_and_pickles_hold_parameters_only():
    layer, hidden_state = a_block(), torch.randn(1, 5, 6, 16)
    size = len(pickle.dumps(layer))
    fused, _ = outputs(layer, hidden_state)
    assert len(pickle.dumps(layer)) == size
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(outputs(other, hidden_state)[0], fused, rtol=0, atol=0)


def hooked(layer):
    layer.mlp.fc1.register_forward_hook(lambda *_: None)


def wrapped(layer):
    layer.mlp.fc1 = torch.nn.Sequential(layer.mlp.fc1)


def rebound(layer):
    layer.norm2.forward = layer.norm2.forward


def another_activation(layer):
    layer.mlp.activation = torch.nn.ReLU()


def in_double(layer):
    layer.mlp.fc1.double()


def sparse(layer):
    layer.mlp.fc1.weight = torch.nn.Parameter(layer.mlp.fc1.weight.detach().to_sparse_csr())


def computed(layer):
    """What torch.nn.utils did before there were parametrizations: the weight is an attribute."""
    weight = layer.mlp.fc1.weight.detach()
    del layer.mlp.fc1.weight
    layer.mlp.fc1.weight = 2 * weight


def without_a_norm(layer):
    layer.norm2 = torch.nn.Identity()


def dilated(layer):
    layer.modulation.focal_layers[0][0].dilation = (2, 2)


def circular(layer):
    layer.modulation.focal_layers[0][0].padding_mode = "circular"


def with_dropout(layer):
    """Monte Carlo dropout."""
    layer.mlp.drop.p = 0.5
    layer.mlp.drop.train()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (hooked, "mlp.fc1 is Linear, or was wrapped or hooked"),
        (wrapped, "mlp.fc1 is Sequential"),
        (rebound, "norm2 is LayerNorm, or was wrapped or hooked"),
        (another_activation, "mlp.activation is ReLU"),
        (in_double, "mlp.fc1.weight is Parameter, torch.strided, torch.float64"),
        (sparse, "mlp.fc1.weight is Parameter, torch.sparse_csr"),
        (computed, "mlp.fc1 is Linear"),
        (without_a_norm, "norm2 is Identity"),
        (dilated, "modulation.focal_layers.0.0 is Conv2d"),
        (circular, "modulation.focal_layers.0.0 is Conv2d"),
        (with_dropout, "drop is in training mode"),
    ],
)
@pytest.mark.parametrize("used_before", [False, True], ids=["new", "used before"])
def test_what_the_operator_cannot_stand_for_goes_by_modules(change, expected, used_before):
    layer, hidden_state = a_block(), torch.randn(1, 5, 6, 16)
    if used_before:
        outputs(layer, hidden_state)
    change(layer)
    assert expected in reason(layer, hidden_state)


def test_a_block_is_one_operator_again_once_a_hook_is_gone():
    layer, hidden_state = a_block(), torch.randn(1, 5, 6, 16)
    hook = layer.mlp.fc1.register_forward_hook(lambda *_: None)
    assert reason(layer, hidden_state) is not None
    hook.remove()
    assert reason(layer, hidden_state) is None


ANYWHERE = ["", "layers.1", "layers.1.mlp.fc1", "downsample", "downsample.projection"]


@pytest.mark.parametrize("path", [f"encoder.stages.1.{name}".rstrip(".") for name in ANYWHERE])
def test_hooks_anywhere_are_called_though_a_model_asks_but_once(path):
    """Before its first block the model asks whether operators take all of them, and the downsamplings."""
    model = build(focalnet, NAME, SMALL)
    with torch.inference_mode():
        expected = model(images()).logits
        calls = []
        hook = model.focalnet.get_submodule(path).register_forward_hook(lambda *_: calls.append(path))
        torch.testing.assert_close(model(images()).logits, expected)
        assert calls == [path]
        hook.remove()
        assert torch.equal(model(images()).logits, expected)


@pytest.mark.parametrize("change", [in_place, by_replacing_a_parameter, by_a_setting, by_data])
def test_a_model_sees_a_change_of_its_last_block(change):
    model = build(focalnet, NAME, SMALL)
    with torch.inference_mode():
        before = model(images()).logits
    change(model.focalnet.encoder.stages[-1].layers[-1])
    with torch.inference_mode():
        after = model(images()).logits
        with focalnet.use_backend("reference"):
            torch.testing.assert_close(after, model(images()).logits)
    assert not torch.allclose(after, before)


def test_another_module_in_the_place_of_a_modulation():
    model = build(focalnet, NAME, SMALL)
    model.focalnet.encoder.stages[0].layers[0].modulation = torch.nn.Identity()
    with torch.inference_mode():
        logits = model(images()).logits
        with focalnet.use_backend("reference"):
            torch.testing.assert_close(logits, model(images()).logits)


def test_calls_that_need_the_modules():
    layer, hidden_state = a_block(), torch.randn(1, 5, 6, 16)
    assert "gradients" in cpu_block.runner(layer, OURS, hidden_state)
    assert "torch.bfloat16" in reason(layer, hidden_state.bfloat16())
    with torch.autocast("cpu", torch.float16):
        assert "autocast to torch.float16" in reason(layer, hidden_state)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast to torch.bfloat16 is on, and the input is torch.float64" in reason(
            layer, hidden_state.double()
        )
    with focalnet.use_backend("reference"):
        assert "'reference' was asked for" in reason(layer, hidden_state)
    layer.train()
    assert "training" in reason(layer, hidden_state)


def test_what_is_bound_to_a_block_does_not_keep_it_alive():
    layer = a_block()
    layer.forward = functools.partial(type(layer).forward, layer)  # as focalnet.patch does
    with torch.inference_mode():
        layer(torch.randn(1, 5, 6, 16))
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None

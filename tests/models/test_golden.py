"""Equal to the authors' code and to timm: outputs and gradients that those computed, for the same weights."""

import pytest
import torch
from golden import MODELS, format_of, input_of, settings_of, tensors_of, write

from focalnet import FocalNetBackbone, FocalNetForImageClassification, load_checkpoint
from focalnet.checkpoints.key_maps import rename

# Outputs were computed in float32, gradients in float64 and then rounded to float32. In float32, these random networks
# amplify rounding to several 1e-5 of the largest gradient in any implementation.
FLOAT32 = 1e-5
ROUNDED = 1e-6


def assert_close(actual, expected, relative, what):
    assert actual.shape == expected.shape, what
    scale = expected.abs().max()
    difference = (actual - expected).abs().max()
    assert difference <= relative * scale, f"{what}: off by {difference / scale:.2e} of the largest value"


def outputs_of(model, images):
    if isinstance(model, FocalNetBackbone):
        return model(images).feature_maps
    return (model(images).logits,)


@pytest.mark.parametrize("name", MODELS)
def test_outputs(name, tmp_path):
    model = load_checkpoint(write(name, tmp_path), **settings_of(name))
    is_detector = format_of(name) == "authors-detection"
    assert type(model) is (FocalNetBackbone if is_detector else FocalNetForImageClassification)
    assert not model.training
    expected = tensors_of(name, "output")
    with torch.no_grad():
        outputs = outputs_of(model, input_of(name))
    assert len(outputs) == len(expected)
    for index, output in enumerate(outputs):
        assert_close(output, expected[str(index)], FLOAT32, f"output {index}")


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name, tmp_path):
    model = load_checkpoint(write(name, tmp_path), **settings_of(name)).double()
    images = input_of(name).double().requires_grad_()
    cotangents = tensors_of(name, "cotangent")
    outputs = outputs_of(model, images)
    torch.autograd.backward(outputs, [cotangents[str(index)].double() for index in range(len(outputs))])

    gradients = tensors_of(name, "grad")
    assert_close(images.grad, gradients.pop("input").double(), ROUNDED, "gradient of the input")
    # Gradients are named as parameters are, and go through the same table.
    naming = "timm" if format_of(name) == "timm" else "authors"
    renamed, unknown = rename(gradients, naming, "transformers", model.config.use_post_layernorm)
    ours = {key.removeprefix("focalnet."): parameter.grad for key, parameter in model.named_parameters()}
    assert not unknown
    assert not renamed or renamed.keys() == ours.keys()
    for key, gradient in renamed.items():
        assert_close(ours[key], gradient.double(), ROUNDED, f"gradient of {key}")


def test_some_models_have_gradients_of_every_parameter():
    complete = [name for name in MODELS if len(tensors_of(name, "grad")) == len(tensors_of(name, "param")) + 1]
    assert len(complete) >= 3


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name]["config"].get("normalize_modulator")])
def test_the_setting_that_shapes_do_not_tell_changes_the_result(name, tmp_path):
    wrong = {**settings_of(name), "normalize_modulator": False}
    model = load_checkpoint(write(name, tmp_path), **wrong)
    with torch.no_grad():
        logits = model(input_of(name)).logits
    expected = tensors_of(name, "output")["0"]
    assert (logits - expected).abs().max() > 1e-2 * expected.abs().max()

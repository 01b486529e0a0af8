"""What the models say to input that does not fit, and what they make of input that is merely odd."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import (
    CLASS,
    FIELDS,
    SMALL,
    assert_equal,
    build,
    images,
    one_thread,  # noqa: F401
    tensors,
)
from transformers import BatchFeature

import focalnet


@pytest.mark.parametrize("length", [63, 65, 49])
@pytest.mark.parametrize("name", ["FocalNetModel", "FocalNetForMaskedImageModeling"])
def test_a_mask_of_the_wrong_length_is_refused(name, length):
    kwargs = {"use_mask_token": True} if name == "FocalNetModel" else {}
    model = build(focalnet, name, SMALL, **kwargs)
    with pytest.raises(ValueError, match=rf"bool_masked_pos: .*\(2, 64\).* 8 x 8 grid, got \(2, {length}\)"):
        model(images(), bool_masked_pos=torch.ones(2, length, dtype=torch.bool))


def test_a_mask_of_another_batch_is_refused():
    model = build(focalnet, "FocalNetForMaskedImageModeling", SMALL)
    with pytest.raises(ValueError, match=r"bool_masked_pos: expected shape \(2, 64\).*got \(1, 64\)"):
        model(images(), bool_masked_pos=torch.ones(1, 64, dtype=torch.bool))


def test_a_mask_without_mask_token_is_refused():
    with pytest.raises(ValueError, match=r"bool_masked_pos: this model has no mask token.*use_mask_token=True"):
        build(focalnet, "FocalNetModel", SMALL)(images(), bool_masked_pos=torch.ones(2, 64, dtype=torch.bool))


@CLASS
@pytest.mark.parametrize(
    "pixel_values, error, message",
    [
        (torch.rand(2, 4, 32, 32), ValueError, r"pixel_values: expected shape \(B, 3, H, W\).*got \(2, 4, 32, 32\)"),
        (torch.rand(3, 32, 32), ValueError, r"pixel_values: expected shape \(B, 3, H, W\).*got \(3, 32, 32\)"),
        (torch.rand(2, 32, 32, 3), ValueError, r"pixel_values: expected shape \(B, 3, H, W\).*got \(2, 32, 32, 3\)"),
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), TypeError, r"pixel_values: expected floating.* got torch.uint8"),
        (None, ValueError, "pixel_values"),
    ],
    ids=["channels", "rank", "channels last", "integers", "none"],
)
def test_images_that_do_not_fit_are_refused(name, pixel_values, error, message):
    with pytest.raises(error, match=message):
        build(focalnet, name, SMALL)(pixel_values)


@CLASS
@pytest.mark.parametrize(
    "pixel_values, message",
    [
        (np.zeros((2, 3, 32, 32), np.float32), r"got numpy.ndarray of shape \(2, 3, 32, 32\); pass torch.from_numpy"),
        (Image.new("RGB", (32, 32)), r"got PIL.Image.Image; an image processor makes one: model\(\*\*processor"),
        ([torch.zeros(3, 32, 32)], r"got list; an image processor makes one"),
        ("cat.png", r"got str; an image processor makes one"),
        (BatchFeature({"pixel_values": torch.zeros(2, 3, 32, 32)}), r"BatchFeature, .*call model\(\*\*inputs\)"),
    ],
    ids=["array", "PIL", "list", "path", "processor's output"],
)
def test_what_is_no_tensor_is_named_with_what_makes_one_of_it(name, pixel_values, message):
    with pytest.raises(TypeError, match=r"pixel_values: expected a torch.Tensor \(B, 3, H, W\), " + f".*{message}"):
        build(focalnet, name, SMALL)(pixel_values)


def test_channels_that_come_last_are_told_how_to_come_first():
    with pytest.raises(ValueError, match=r"got \(2, 32, 32, 3\); channels come first here: .permute\(0, 3, 1, 2\)"):
        build(focalnet, "FocalNetModel", SMALL)(torch.rand(2, 32, 32, 3))


def test_a_modulation_of_an_array_names_its_argument():
    with pytest.raises(TypeError, match=r"hidden_state: expected a torch.Tensor \(B, H, W, 8\), got numpy.ndarray"):
        focalnet.FocalModulation(8)(np.zeros((1, 4, 4, 8), np.float32))


@pytest.mark.parametrize("labels, value", [([0, 5], 5), ([-1, 0], -1)])
def test_labels_out_of_range_are_refused(labels, value):
    model = build(focalnet, "FocalNetForImageClassification", SMALL)
    with pytest.raises(ValueError, match=rf"labels: expected class indices from 0 to 4 .* got {value}$"):
        model(images(), labels=torch.tensor(labels))


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"hidden_act: expected one of .*gelu.*selu.*, got 'gleu'"):
        focalnet.FocalNetConfig(hidden_act="gleu")


def test_a_configuration_changed_into_something_wrong_is_refused_by_the_model():
    config = focalnet.FocalNetConfig(**SMALL)
    config.focal_windows = [3, 4, 3]
    with pytest.raises(ValueError, match=r"focal_windows: expected .*odd.*got \[3, 4, 3\]"):
        focalnet.FocalNetModel(config)


def test_selu_works_as_hidden_act():
    model = build(focalnet, "FocalNetForImageClassification", SMALL | {"hidden_act": "selu"})
    mlp = model.focalnet.encoder.stages[0].layers[0].mlp
    x = torch.linspace(-3, 3, 8)
    with torch.no_grad():
        assert_equal(mlp(x), mlp.fc2(torch.nn.functional.selu(mlp.fc1(x))))
        assert torch.isfinite(model(images()).logits).all()


@FIELDS
@CLASS
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4], ids=lambda value: f"{value:g}")
def test_an_image_without_variance_gives_finite_outputs_and_gradients(name, fields, value):
    model = build(focalnet, name, fields)
    with torch.no_grad():
        model.get_input_embeddings().projection.bias.zero_()
    outputs = model(torch.full((2, 3, 32, 32), value))
    sum(tensor.square().sum() for tensor in tensors(outputs)).backward()
    for tensor in [*tensors(outputs), *(p.grad for p in model.parameters() if p.grad is not None)]:
        assert torch.isfinite(tensor).all()

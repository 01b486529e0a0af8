"""Small models with equal weights in focalnet and transformers, images for them, and comparisons of their results."""

import pytest
import torch
import transformers

CLASSES = ["FocalNetModel", "FocalNetForImageClassification", "FocalNetForMaskedImageModeling", "FocalNetBackbone"]
SMALL = {
    "image_size": 32,
    "embed_dim": 8,
    "hidden_sizes": [16, 32, 32],
    "depths": [1, 2, 1],
    "focal_levels": [2, 1, 3],
    "focal_windows": [3, 5, 3],
    "encoder_stride": 16,
    "num_labels": 5,
    "out_features": ["stem", "stage2", "stage3"],
}
EVERY_OPTION = {
    **SMALL,
    "use_conv_embed": True,
    "use_layerscale": True,
    "layerscale_value": 0.5,
    "use_post_layernorm": True,
    "use_post_layernorm_in_modulation": True,
    "normalize_modulator": True,
    "mlp_ratio": 3.0,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-3,
}
FIELDS = pytest.mark.parametrize("fields", [SMALL, EVERY_OPTION], ids=["defaults", "every option"])
CLASS = pytest.mark.parametrize("name", CLASSES)
CLASS_WITH_HEAD = pytest.mark.parametrize("name", CLASSES[1:])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs the importing module on one thread. On several, small models are slower, by minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(library, name, fields, **kwargs):
    """A model with the same weights in each library, large enough for every part to affect the outputs."""
    torch.manual_seed(0)
    model = getattr(library, name)(library.FocalNetConfig(**fields), **kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.3 * noise)
    return model


def theirs(fields=SMALL, name="FocalNetForImageClassification"):
    return build(transformers, name, fields)


def modulations(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "focal_layers")}


def images(*size, batch=2, dtype=torch.float32):
    height, width = size or (32, 32)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def tensors(outputs):
    """All tensors of nested outputs, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def assert_equal(actual, expected):
    """Assert that each tensor agrees within 1e-5 of its largest expected value."""
    actual, expected = tensors(actual), tensors(expected)
    assert [x.shape for x in actual] == [x.shape for x in expected]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())


def assert_same_gradients(actual, expected):
    gradients = {key: p.grad for key, p in actual.named_parameters() if p.grad is not None}
    assert gradients.keys() == {key for key, p in expected.named_parameters() if p.grad is not None}
    largest = max(p.grad.abs().max().item() for p in expected.parameters() if p.grad is not None)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get_parameter(key).grad, rtol=0, atol=1e-5 * largest)

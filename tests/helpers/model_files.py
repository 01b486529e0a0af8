"""Makes small random models, and saves them in every published format."""

import pytest
import torch
from safetensors.torch import save_file

from focalnet import (
    FocalNetBackbone,
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    FocalNetModel,
)
from focalnet.checkpoints.files import read_directory, read_tensors
from focalnet.checkpoints.key_maps import rename

SMALL = {"embed_dim": 8, "depths": [1, 2], "focal_levels": [2, 3], "focal_windows": [3, 5], "num_labels": 5}
SETTLED = {"normalize_modulator": False, "use_post_layernorm": False}
DETECTION = {
    "feature_maps_before_downsampling": True,
    "use_feature_map_norms": True,
    "out_features": ["stage1", "stage2"],
    "num_labels": 2,
}
CLASSES = {
    "classifier": FocalNetForImageClassification,
    "masked-image-modeling": FocalNetForMaskedImageModeling,
    "backbone": FocalNetBackbone,
    "base": FocalNetModel,
}


def randomized(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def named(model, naming):
    bare = {name.removeprefix("focalnet."): tensor for name, tensor in model.state_dict().items()}
    renamed, without_place = rename(bare, "transformers", naming, model.config.use_post_layernorm)
    assert not without_place
    return renamed


def file_of(model, format, folder):
    """Save the model as models of ``format`` are published. Returns the path."""
    if format == "transformers":
        model.save_pretrained(folder / "saved")
        return folder / "saved"
    path = folder / ("model.safetensors" if format == "timm" else "model.pth")
    if format == "timm":
        save_file({name: tensor.contiguous() for name, tensor in named(model, "timm").items()}, path)
    else:
        torch.save({"model": named(model, "authors"), "epoch": 3, "optimizer": {"lr": [0.1]}}, path)
    return path


def authors_file(tmp_path, **fields):
    return file_of(
        randomized(FocalNetForImageClassification(FocalNetConfig(**{**SMALL, **fields}))), "authors", tmp_path
    )


def stored(path):
    return read_directory(path) if path.is_dir() else read_tensors(path)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert first[name].shape == second[name].shape, name
        assert torch.equal(first[name].view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)), name


def message_of(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    # A user sees this message alone, not a chain of internal errors.
    assert caught.value.__cause__ is None
    return str(caught.value)


def detector(**fields):
    return randomized(FocalNetBackbone(FocalNetConfig(**{**SMALL, **DETECTION, **fields})))

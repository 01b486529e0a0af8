"""What is wrong with a checkpoint is said in one message, and nothing in a file ever runs. Files, directories, hub."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from command_line import assert_one_line_error, offline_and_undone, run
from model_files import (
    SETTLED,
    SMALL,
    assert_same_bits,
    authors_file,
    file_of,
    message_of,
    named,
    randomized,
    stored,
)
from safetensors.torch import load_file, save_file

from focalnet import (
    FocalNetBackbone,
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetModel,
    convert_checkpoint,
    load_checkpoint,
)


def test_all_problems_in_one_message(tmp_path):
    path = authors_file(tmp_path)
    tensors = torch.load(path)["model"]
    del tensors["layers.0.blocks.0.mlp.fc2.weight"], tensors["norm.bias"]
    tensors["layers.1.blocks.0.modulation.h.weight"] = torch.zeros(16, 15, 1, 1)
    tensors["layers.0.blocks.0.attn.qkv.weight"] = torch.zeros(3, 4)
    tensors.update({f"extra.{index}": torch.zeros(1) for index in range(20)})
    torch.save({"model": tensors}, path)
    message = message_of(ValueError, load_checkpoint, path, **SETTLED)
    assert str(path) in message
    assert "2 missing: " in message
    assert "layers.0.blocks.0.mlp.fc2.weight (8, 32)" in message
    assert "norm.bias (16,)" in message
    assert "layers.1.blocks.0.modulation.h.weight is (16, 15, 1, 1), expected (16, 16, 1, 1)" in message
    assert "21 unexpected: layers.0.blocks.0.attn.qkv.weight (3, 4)" in message
    assert "... and 13 more" in message
    assert "extra.19" not in message


@pytest.mark.parametrize("name", ["head.weight", "patch_embed.proj.bias", "layers.0.blocks.0.norm1.weight"])
def test_one_mis_shaped_tensor_does_not_mislead(name, tmp_path):
    path = authors_file(tmp_path)
    tensors = torch.load(path)["model"]
    tensors[name] = torch.zeros(*(size + 1 for size in tensors[name].shape))
    torch.save({"model": tensors}, path)
    message = message_of(ValueError, load_checkpoint, path, **SETTLED)
    assert f"{name} is " in message
    assert "missing" not in message


def test_too_little_to_tell(tmp_path):
    path = authors_file(tmp_path)
    tensors = {name: tensor for name, tensor in torch.load(path)["model"].items() if "focal_layers" not in name}
    torch.save({"model": tensors}, path)
    assert "no tensor tells focal_windows" in message_of(ValueError, load_checkpoint, path, **SETTLED)
    message = message_of(ValueError, load_checkpoint, path, **SETTLED, focal_windows=[3, 5])
    assert "8 missing: layers.0.blocks.0.modulation.focal_layers.0.0.weight (8, 1, 3, 3)" in message


def test_missing_tensors_of_a_transformers_directory(tmp_path):
    model = FocalNetForImageClassification(FocalNetConfig(**SMALL))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["focalnet.layernorm.weight"], tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = message_of(ValueError, load_checkpoint, tmp_path)
    assert "2 missing: layernorm.weight (16,), classifier.bias (5,)" in message


def test_not_a_focalnet(tmp_path):
    save_file({"conv1.weight": torch.zeros(1), "layer1.0.bn1.bias": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    message = message_of(ValueError, load_checkpoint, tmp_path / "resnet.safetensors")
    assert "expected the keys of a FocalNet" in message
    assert "conv1.weight" in message


def test_layernorm_in_modulation_goes_through_every_naming(tmp_path):
    """The converter published with transformers leaves the authors' ``modulation.ln`` under its old name."""
    config = FocalNetConfig(**SMALL, use_post_layernorm_in_modulation=True)
    model = randomized(FocalNetForImageClassification(config))
    for format, name in (("authors", "modulation.ln.weight"), ("timm", "modulation.norm.weight")):
        path = file_of(model, format, tmp_path)
        assert any(key.endswith(name) for key in stored(path))
        loaded = load_checkpoint(path, **(SETTLED if format == "authors" else {"normalize_modulator": False}))
        assert_same_bits(model.state_dict(), loaded.state_dict())


class RunsCode:
    """Unpickled without care, this makes a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "directory", "from_pretrained", "convert"])
def test_hostile_pickles_are_refused(how, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pth"
    content = {
        "model": named(FocalNetForImageClassification(FocalNetConfig(**SMALL)), "authors"),
        "x": RunsCode(trace),
    }
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    function, args = load_checkpoint, (path,)
    if how == "directory":
        FocalNetConfig(**SMALL).save_pretrained(tmp_path / "saved")
        path = path.rename(tmp_path / "saved" / "pytorch_model.bin")
        args = (tmp_path / "saved",)
    elif how == "from_pretrained":
        function = FocalNetForImageClassification.from_pretrained
    elif how == "convert":
        function, args = convert_checkpoint, (path, tmp_path / "converted")
    message = message_of(ValueError, function, *args)
    assert "refused" in message
    assert path.name in message
    assert not trace.exists()
    assert not (tmp_path / "converted").exists()


def test_the_hostile_pickle_is_one(tmp_path):
    """The test above proves something only if the trace appears where code does run."""
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files(kind, kept, tmp_path):
    model = FocalNetForImageClassification(FocalNetConfig(**SMALL))
    if kind == "safetensors":
        path = file_of(model, "timm", tmp_path)
    else:
        path = tmp_path / "model.pth"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    message = message_of(ValueError, load_checkpoint, path)
    assert str(path) in message
    assert "again" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>not found</html>", "of another kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x02}q\x00.", "of another kind"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "safetensors"),
    ],
    ids=["html", "git lfs", "pickle", "numpy"],
)
def test_files_of_other_kinds(content, said, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    message = message_of(ValueError, load_checkpoint, tmp_path / "model.pth")
    assert said in message
    assert "model.pth" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(2), "got Tensor"),
        ({"weights": {"a": torch.zeros(1)}, "epoch": 1}, "'weights', 'epoch' that are not tensors"),
        ({"model": Path("x")}, "'model' (of pathlib."),
        (Path("x"), "holds an object of pathlib."),
        ({"model": {"a": 1.0}}, "'a' that are not tensors"),
        ({}, "an empty dict"),
    ],
    ids=["tensor", "other entries", "object", "whole model", "numbers", "empty"],
)
def test_files_without_a_state_dict(content, said, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    assert said in message_of(ValueError, load_checkpoint, tmp_path / "model.pth")


def test_broken_directories(tmp_path):
    assert "model.safetensors" in message_of(FileNotFoundError, load_checkpoint, tmp_path)
    model = FocalNetForImageClassification(FocalNetConfig(**SMALL))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "focal')
    assert "config.json: expected JSON" in message_of(ValueError, load_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "expected a JSON object, got list" in message_of(ValueError, load_checkpoint, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for names in ({"a": "../outside.safetensors"}, ["a"]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert "weight_map" in message_of(ValueError, load_checkpoint, tmp_path)


@pytest.mark.parametrize("call", ["load_checkpoint", "from_pretrained", "classify"])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "swin", "architectures": ["SwinForImageClassification"]}, ["'swin' (SwinFor", "AutoModel"]),
        ({"architecture": "resnet50", "num_classes": 10}, ["'resnet50'", "timm.create_model('resnet50', ...)"]),
    ],
    ids=["transformers", "timm"],
)
def test_folders_of_other_architectures(config, said, call, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    if call == "classify":
        with offline_and_undone(monkeypatch):
            result = run("classify", __file__, "--model", tmp_path)
        assert_one_line_error(result, "--model", "expected 'focalnet'", *said)
        return
    function = {"load_checkpoint": load_checkpoint, "from_pretrained": FocalNetModel.from_pretrained}[call]
    message = message_of(ValueError, function, tmp_path)
    for words in (str(tmp_path), "expected 'focalnet'", *said):
        assert words in message


def test_folder_of_a_larger_model_with_a_focalnet_in_it(tmp_path):
    config = FocalNetConfig(**SMALL)
    model = randomized(FocalNetBackbone(config))
    tensors = {f"model.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({**tensors, "decode_head.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    whole = {"model_type": "upernet", "backbone_config": {"model_type": "focalnet"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert_same_bits(model.state_dict(), load_checkpoint(tmp_path, **SETTLED).state_dict())


@pytest.mark.parametrize("weights_beside", [True, False])
@pytest.mark.parametrize("call", ["load_checkpoint", "from_pretrained", "classify"])
def test_a_configuration_for_weights(call, weights_beside, tmp_path, monkeypatch):
    FocalNetForImageClassification(FocalNetConfig(**SMALL)).save_pretrained(tmp_path)
    if not weights_beside:
        (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "config.json"
    advice = f"pass its folder, {tmp_path}" if weights_beside else "pass the file of the weights"
    if call == "classify":
        with offline_and_undone(monkeypatch):
            result = run("classify", __file__, "--model", path)
        assert_one_line_error(result, "--model", "this is JSON", advice)
        return
    function = {"load_checkpoint": load_checkpoint, "from_pretrained": FocalNetModel.from_pretrained}[call]
    message = message_of(ValueError, function, path)
    assert str(path) in message
    assert advice in message


@pytest.mark.parametrize("settings", [{"num_labels": 3}, {"id2label": {0: "cat", 1: "dog", 2: "owl"}}], ids=str)
@pytest.mark.parametrize("kind", ["authors", "timm", "transformers", "no head"])
def test_another_number_of_labels_is_from_pretrained_to_make(kind, settings, tmp_path):
    model = (FocalNetModel if kind == "no head" else FocalNetForImageClassification)(FocalNetConfig(**SMALL))
    path = file_of(model, "authors" if kind == "no head" else kind, tmp_path)
    message = message_of(
        ValueError, load_checkpoint, path, normalize_modulator=False, use_post_layernorm=False, **settings
    )
    assert str(path) in message
    shown = {"authors": "head.weight is (5, 16)", "timm": "head.fc.weight is (5, 16)", "no head": "has no head"}
    assert shown.get(kind, "classifier.weight is (5, 16)") in message
    advice = message[message.index("FocalNetForImageClassification.from_pretrained") :]
    loaded = eval(advice)
    assert loaded.classifier.out_features == 3
    assert not loaded.config.normalize_modulator


def test_the_number_of_labels_that_a_file_has_may_be_given(tmp_path):
    assert load_checkpoint(authors_file(tmp_path), **SETTLED, num_labels=5).config.num_labels == 5
    names = dict(enumerate("abcde"))
    assert load_checkpoint(authors_file(tmp_path), **SETTLED, id2label=names).config.id2label == names


def test_what_is_no_path_and_no_id(tmp_path):
    for name in (tmp_path / "missing.pth", "models/missing.safetensors", "a/b/c", "./missing", ""):
        assert "expected a file, a directory" in message_of(FileNotFoundError, load_checkpoint, name)


def test_hub_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = message_of(OSError, load_checkpoint, "microsoft/focalnet-tiny")
    for said in ("'microsoft/focalnet-tiny'", "no file or directory here", "hub", "connection", "path"):
        assert said in message


def cached(model_id, fill, cache):
    """A repository of the hub in a cache, as huggingface_hub lays it out."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    fill(snapshot)


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_id_from_the_cache(sharded, monkeypatch, tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    options = {"max_shard_size": "8KB"} if sharded else {}
    cached("someone/focalnet", lambda folder: model.save_pretrained(folder, **options), tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    original = __import__("huggingface_hub").hf_hub_download
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: original(*args, cache_dir=tmp_path))
    assert_same_bits(model.state_dict(), load_checkpoint("someone/focalnet").state_dict())
    cached("someone/half", lambda folder: FocalNetConfig().save_pretrained(folder), tmp_path)
    assert "pytorch_model.bin" in message_of(OSError, load_checkpoint, "someone/half")


@pytest.mark.parametrize("format", ["authors", "timm", "transformers"])
def test_from_pretrained_of_a_file(format, tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL, use_post_layernorm=True)))
    path = file_of(model, format, tmp_path)
    settings = {"normalize_modulator": False, "use_post_layernorm": True}
    path = path / "model.safetensors" if path.is_dir() else path
    loaded = FocalNetForImageClassification.from_pretrained(path, **settings)
    assert_same_bits(model.state_dict(), loaded.state_dict())
    assert not loaded.training
    # Another class takes the body, and what it lacks or has too much is reported as for any checkpoint.
    base, info = FocalNetModel.from_pretrained(str(path), **settings, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    assert_same_bits(model.focalnet.state_dict(), base.state_dict())
    backbone = FocalNetBackbone.from_pretrained(path, **settings, out_features=["stage1"])
    assert_same_bits(model.focalnet.state_dict(), backbone.focalnet.state_dict())
    assert backbone.out_features == ["stage1"]
    half = FocalNetForImageClassification.from_pretrained(path, **settings, dtype=torch.float16)
    assert half.dtype is torch.float16


def test_from_pretrained_with_a_new_head(tmp_path):
    path = authors_file(tmp_path)
    loaded, info = FocalNetForImageClassification.from_pretrained(
        path, **SETTLED, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert loaded.classifier.out_features == 3
    assert {entry[0] for entry in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FocalNetForImageClassification.from_pretrained(path, **SETTLED, num_labels=3)
    message = message_of(ValueError, load_checkpoint, path, **SETTLED, num_labels=3)
    assert "head.weight is (5, 16), expected (3, 16)" in message


def test_from_pretrained_of_a_file_with_a_config(tmp_path):
    config = FocalNetConfig(**SMALL, use_post_layernorm=True, layer_norm_eps=1e-6)
    path = file_of(FocalNetForImageClassification(config), "authors", tmp_path)
    assert FocalNetForImageClassification.from_pretrained(path, config=config).config.layer_norm_eps == 1e-6
    config.save_pretrained(tmp_path / "config")
    loaded = FocalNetForImageClassification.from_pretrained(path, config=str(tmp_path / "config"))
    assert loaded.config.use_post_layernorm


def test_from_pretrained_checks_the_body(tmp_path):
    path = authors_file(tmp_path)
    tensors = torch.load(path)["model"]
    del tensors["layers.0.blocks.0.norm1.bias"]
    torch.save(tensors, path)
    message = message_of(ValueError, FocalNetModel.from_pretrained, path, **SETTLED)
    assert "1 missing: layers.0.blocks.0.norm1.bias (8,)" in message

"""Checkpoints: every format recognised, its configuration inferred, or asked for where nothing tells it."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from golden import MODELS, format_of, settings_of
from golden import write as write_golden
from model_files import (
    CLASSES,
    DETECTION,
    SETTLED,
    SMALL,
    assert_same_bits,
    authors_file,
    detector,
    file_of,
    message_of,
    named,
    randomized,
)

from focalnet import (
    FocalNetBackbone,
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetModel,
    convert_checkpoint,
    load_checkpoint,
)
from focalnet.checkpoints import reading, structure
from focalnet.checkpoints.reading import interpret, read_checkpoint
from focalnet.variants import Variant

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "variants.json").read_text())["variants"]


@pytest.mark.parametrize("name", MODELS)
def test_golden_files_are_recognised(name, tmp_path):
    checkpoint = read_checkpoint(write_golden(name, tmp_path), **settings_of(name))
    assert checkpoint.format == format_of(name)
    assert checkpoint.kind == ("backbone" if format_of(name) == "authors-detection" else "classifier")
    assert not checkpoint.unknown
    config, published = checkpoint.config, MODELS[name]["config"]
    assert config.embed_dim == published["embed_dim"]
    assert config.depths == published["depths"]
    assert config.focal_levels == published.get("focal_levels", [2] * 4)
    assert config.focal_windows == published.get("focal_windows", [3] * 4)
    assert config.patch_size == published.get("patch_size", 4)
    assert config.use_conv_embed == published.get("use_conv_embed", published.get("use_overlap_down", False))
    assert config.use_post_layernorm == published.get("use_postln", published.get("use_post_norm", False))
    assert config.use_layerscale == (published.get("use_layerscale", False) or "layerscale_value" in published)
    in_modulation = ("use_postln_in_modulation", "use_post_norm_in_modulation")
    assert config.use_post_layernorm_in_modulation == any(published.get(name, False) for name in in_modulation)
    if checkpoint.kind == "classifier":
        assert config.num_labels == published["num_classes"]
    else:
        assert config.out_features == ["stage1", "stage2", "stage3", "stage4"]
        assert config.stem_padding == settings_of(name).get("stem_padding")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("beside", [True, False], ids=["with config.json", "without"])
def test_class_of_transformers_files(kind, beside, tmp_path):
    model = randomized(CLASSES[kind](FocalNetConfig(**SMALL, encoder_stride=8)))
    folder = file_of(model, "transformers", tmp_path)
    if not beside:
        (folder / "config.json").unlink()
    settings = {} if beside else SETTLED
    for path in (folder, folder / "model.safetensors"):
        loaded = load_checkpoint(path, **settings)
        assert type(loaded) is CLASSES[kind]
        assert not loaded.training
        assert loaded.config.encoder_stride == 8
        assert_same_bits(model.state_dict(), loaded.state_dict())


def test_model_with_mask_token_keeps_it(tmp_path):
    model = randomized(FocalNetModel(FocalNetConfig(**SMALL), use_mask_token=True))
    assert_same_bits(model.state_dict(), load_checkpoint(file_of(model, "transformers", tmp_path)).state_dict())


@pytest.mark.parametrize("naming", ["authors", "timm"])
def test_file_without_head_gives_the_base_model(naming, tmp_path):
    model = randomized(FocalNetModel(FocalNetConfig(**SMALL)))
    loaded = load_checkpoint(file_of(model, naming, tmp_path), **SETTLED)
    assert type(loaded) is FocalNetModel
    assert_same_bits(model.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_transformers_directories(weights, tmp_path):
    model = randomized(transformers.FocalNetForImageClassification(transformers.FocalNetConfig(**SMALL)))
    model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if weights == "sharded" else {}))
    if weights == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / weights)
    elif weights == "sharded":
        assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_bits(model.state_dict(), load_checkpoint(tmp_path).state_dict())
    # The configuration file decides; arguments override it.
    assert load_checkpoint(tmp_path, normalize_modulator=True).config.normalize_modulator
    assert load_checkpoint(str(tmp_path), dtype=torch.float16).dtype is torch.float16


def test_safetensors_come_before_pickles(tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_same_bits(model.state_dict(), load_checkpoint(tmp_path).state_dict())


def test_directory_of_timm(tmp_path):
    """timm's directories have a config.json too, which says nothing about ours."""
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    path = file_of(model, "timm", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "focalnet_tiny_srf", "num_classes": 5}))
    for source in (tmp_path, path):
        loaded = load_checkpoint(source, normalize_modulator=False)
        assert_same_bits(model.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.0.", "module."])
def test_wrapped_detectors(wrapper, prefix, tmp_path, caplog):
    model = detector()
    tensors = {prefix + name: tensor for name, tensor in named(model, "authors").items()}
    if prefix.startswith("backbone"):
        tensors.update({"neck.lateral_convs.0.conv.weight": torch.ones(2), "bbox_head.fc.bias": torch.ones(2)})
    path = tmp_path / "detector.pth"
    torch.save(tensors if wrapper is None else {wrapper: tensors, "meta": {"epoch": 12}, "optimizer": None}, path)
    with caplog.at_level(logging.WARNING, logger="focalnet"):
        loaded = load_checkpoint(path, **SETTLED)
    assert type(loaded) is FocalNetBackbone
    assert_same_bits(model.state_dict(), loaded.state_dict())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("focalnet")]
    assert bool(said) == prefix.startswith("backbone")
    assert not said or ("neck (1 tensors)" in said[0] and "bbox_head" in said[0])


def test_detector_with_some_norms(tmp_path):
    model = detector(out_features=["stage2"])
    loaded = load_checkpoint(file_of(model, "authors", tmp_path), **SETTLED)
    assert loaded.config.out_features == ["stage2"]
    assert loaded.channels == [16]
    assert_same_bits(model.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("chosen", [{"out_features": ["stage1"]}, {"out_indices": [1]}], ids=str)
def test_fewer_maps_than_a_detector_has(chosen, tmp_path):
    loaded = load_checkpoint(file_of(detector(), "authors", tmp_path), **SETTLED, **chosen)
    assert loaded.out_features == ["stage1"]
    assert list(loaded.hidden_states_norms) == ["stage1"]


def test_stem_padding_of_detectors_is_2_and_said(tmp_path, caplog):
    """FocalNet-DINO, detrex, MaskDINO, X-Decoder and Relation-DETR; the authors' mmdet code has 3, on request."""
    path = file_of(detector(use_conv_embed=True), "authors", tmp_path)
    assert load_checkpoint(path, **SETTLED).config.stem_padding == 2
    assert "stem_padding=2" in caplog.text
    assert "stem_padding=3" in caplog.text
    caplog.clear()
    assert load_checkpoint(path, **SETTLED, stem_padding=3).config.stem_padding == 3
    assert "stem_padding" not in caplog.text
    report = convert_checkpoint(path, tmp_path / "converted", **SETTLED)
    assert any("stem_padding=2" in note for note in report.notes)
    back = convert_checkpoint(report.path, tmp_path / "back.pth", "authors-detection")
    assert "stem_padding" not in back.pass_when_reading
    three = convert_checkpoint(path, tmp_path / "three", **SETTLED, stem_padding=3).path
    back = convert_checkpoint(three, tmp_path / "back.pth", "authors-detection")
    assert back.pass_when_reading["stem_padding"] == 3


@pytest.mark.parametrize("outer", ["backbone.", "module.backbone.", ""])
def test_norms_behind_the_network(outer, tmp_path):
    """Relation-DETR and Salience-DETR: ``backbone`` is a Sequential of the network and of the norms of its maps."""
    model = detector()
    tensors = {}
    for name, tensor in named(model, "authors").items():
        tensors[f"{outer}{1 if name.startswith('norm') else 0}.{name}"] = tensor
    tensors["transformer.level_embeds"] = torch.ones(2)
    torch.save({"model": tensors}, tmp_path / "relation_detr.pth")
    loaded = load_checkpoint(tmp_path / "relation_detr.pth", **SETTLED)
    assert type(loaded) is FocalNetBackbone
    assert loaded.out_features == ["stage1", "stage2"]
    assert_same_bits(model.state_dict(), loaded.state_dict())


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        ((".norm1.", ".dw1."), ["SEEM's", "X-Decoder's", "dw1", "focalnet.patch(model)"]),
        ((".modulation.", ".attn."), ["Swin or Focal Transformer", "attention"]),
    ],
)
def test_relatives_are_refused_by_name(renamed, said, tmp_path):
    tensors = named(detector(), "authors")
    tensors.update({name.replace(*renamed): tensor for name, tensor in tensors.items()})
    if "attn" in renamed[1]:
        tensors = {name: tensor for name, tensor in tensors.items() if ".modulation." not in name}
    torch.save({"model": {f"backbone.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "model.pth")
    message = message_of(ValueError, load_checkpoint, tmp_path / "model.pth", **SETTLED)
    assert str(tmp_path / "model.pth") in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("naming", ["authors", "timm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"embed_dim": 5},
        {"depths": [3], "focal_levels": [1], "focal_windows": [7]},
        {"depths": [1, 1, 2], "focal_levels": [3, 1, 4], "focal_windows": [9, 3, 5]},
        {"num_channels": 1},
        {"num_channels": 4},
        {"use_conv_embed": True},
        {"use_layerscale": True},
        {"use_post_layernorm_in_modulation": True},
        {"mlp_ratio": 2.7},
        {"mlp_ratio": 3.0},
        {"embed_dim": 6, "mlp_ratio": 1.3},
        {"patch_size": 16},
        {"patch_size": [2, 8]},
        {"num_labels": 1},
        {"num_labels": 21842},
        {"use_post_layernorm": True},
        {"normalize_modulator": True},
    ],
    ids=str,
)
def test_each_field_is_inferred(fields, naming):
    config = FocalNetConfig(**{**SMALL, **fields})
    with torch.device("meta"):
        model = FocalNetForImageClassification(config)
    settings = {name: getattr(config, name) for name in SETTLED}
    if naming == "timm":
        del settings["use_post_layernorm"]
    checkpoint = interpret(named(model, naming), "memory", **settings)
    checkpoint.verify(model.state_dict())
    differing = {
        name
        for name in fields | SMALL | settings
        if name != "mlp_ratio" and getattr(checkpoint.config, name) != getattr(config, name)
    }
    assert not differing
    assert abs(checkpoint.config.mlp_ratio - config.mlp_ratio) < 0.15


def test_mlp_ratio_is_the_roundest_that_fits():
    tensors = {}
    for stage, dim in enumerate([96, 192, 384, 768]):
        tensors[f"encoder.stages.{stage}.layers.0.mlp.fc1.bias"] = torch.empty(int(dim * 2.7), device="meta")
        tensors[f"encoder.stages.{stage}.layers.0.norm1.bias"] = torch.empty(dim, device="meta")
    assert structure.infer_fields(tensors, "base", "authors")["mlp_ratio"] == 2.7


def published_state(name, naming):
    """A published variant's state dict by shapes alone, built from variants.json rather than from our table."""
    facts = PUBLISHED[name]
    stages = len(facts["depths"])
    config = FocalNetConfig(
        embed_dim=facts["embed_dim"],
        depths=facts["depths"],
        focal_levels=[facts["levels"]] * stages,
        focal_windows=[facts["window"]] * stages,
        patch_size=facts.get("patch_size", 4),
        use_conv_embed=facts.get("conv_embed", False),
        use_layerscale=facts.get("layerscale", False),
        use_post_layernorm=facts.get("post_ln", False),
        use_post_layernorm_in_modulation=facts.get("post_ln_in_modulation", False),
        num_labels=facts["classes"],
    )
    with torch.device("meta"):
        return named(FocalNetForImageClassification(config), naming)


@pytest.mark.parametrize("naming", ["authors", "timm"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_are_told_by_their_shapes(name, naming):
    state, facts = published_state(name, naming), PUBLISHED[name]
    if "conflict" in facts:
        message = message_of(ValueError, interpret, state, "large.pth")
        assert "normalize_modulator=True or normalize_modulator=False" in message
        assert name in message
        message = message_of(ValueError, interpret, state, "large.pth", variant=name)
        assert "normalize_modulator" in message
        config = interpret(state, "large.pth", normalize_modulator=True).config
        assert config.normalize_modulator
    else:
        config = interpret(state, "large.pth").config
        assert not config.normalize_modulator
    assert config.use_post_layernorm == facts.get("post_ln", False)
    assert config.image_size == facts["image"]
    assert config.num_labels == facts["classes"]
    assert config.drop_path_rate == facts["drop_path"]


def test_variant_gives_what_shapes_do_not_tell():
    config = interpret(published_state("large_fl3", "authors"), "memory", variant="large_fl3").config
    assert (config.image_size, config.use_post_layernorm, config.normalize_modulator) == (384, True, False)


def test_an_argument_stands_above_the_variant():
    state = published_state("tiny_srf", "authors")
    config = interpret(state, "memory", variant="tiny_srf", normalize_modulator=True, image_size=256).config
    assert (config.image_size, config.use_post_layernorm, config.normalize_modulator) == (256, False, True)


@pytest.mark.parametrize(
    ("windows", "settled"), [([9, 9, 9, 9], True), ([3, 3, 3, 3], True), ([11, 9, 9, 7], False)], ids=str
)
def test_detectors_of_published_variants(windows, settled):
    config = FocalNetConfig.from_variant("tiny_lrf", focal_windows=windows, **DETECTION)
    with torch.device("meta"):
        state = named(FocalNetBackbone(config), "authors")
    if settled:
        assert interpret(state, "memory").config.focal_windows == windows
    else:
        message = message_of(ValueError, interpret, state, "memory")
        assert "normalize_modulator=True" in message
        assert "or variant=, one of tiny_srf" in message
    assert interpret(state, "memory", variant="tiny_lrf").config.focal_windows == windows


@pytest.mark.parametrize(
    ("naming", "asked"),
    [("authors", {"normalize_modulator", "use_post_layernorm"}), ("timm", {"normalize_modulator"})],
)
def test_open_fields_are_asked_for(naming, asked, tmp_path):
    path = file_of(FocalNetForImageClassification(FocalNetConfig(**SMALL)), naming, tmp_path)
    message = message_of(ValueError, load_checkpoint, path)
    assert str(path) in message
    assert "variant=" not in message
    assert set(re.findall(r"(\w+)=True or", message)) == asked
    assert load_checkpoint(path, **dict.fromkeys(asked, False))


def test_seven_by_seven_stem_of_one_stage(tmp_path):
    fields = {"depths": [2], "focal_levels": [2], "focal_windows": [3]}
    for stem in ({"patch_size": 7}, {"use_conv_embed": True}):
        path = authors_file(tmp_path, **fields, **stem)
        assert "use_conv_embed=True" in message_of(ValueError, load_checkpoint, path, **SETTLED)
        overlaps = "use_conv_embed" in stem
        config = load_checkpoint(path, **SETTLED, use_conv_embed=overlaps).config
        assert config.patch_size == (4 if overlaps else 7)


def test_conflicting_variant_at_small_width(tmp_path, monkeypatch):
    small = {
        "open": Variant(8, (1, 2), 2, use_layerscale=True, use_post_layernorm=True, normalize_modulator=None),
        "settled": Variant(12, (1, 2), 2, use_post_layernorm=True, image_size=64),
    }
    for module in (reading, structure):
        monkeypatch.setattr(module, "VARIANTS", small)
    fields = {"depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "use_post_layernorm": True}
    path = authors_file(tmp_path, **fields, embed_dim=8, use_layerscale=True)
    for variant in (None, "open"):
        message = message_of(ValueError, load_checkpoint, path, variant=variant)
        assert "sources of open contradict each other" in message
        assert "use_post_layernorm" not in message
    loaded = load_checkpoint(path, normalize_modulator=True)
    assert loaded.config.normalize_modulator
    assert loaded.config.use_post_layernorm
    path = authors_file(tmp_path, **fields, embed_dim=12)
    assert load_checkpoint(path).config.image_size == 64


def test_contradictions_name_every_field(tmp_path):
    path = authors_file(tmp_path)
    message = message_of(ValueError, load_checkpoint, path, variant="large_fl3")
    for name in ("embed_dim is 192", "depths", "focal_levels", "use_conv_embed is True", "use_layerscale"):
        assert name in message
    message = message_of(ValueError, load_checkpoint, path, depths=[2, 2], use_layerscale=True, **SETTLED)
    assert "depths is [2, 2] by the argument, but [1, 2] in the file" in message
    assert "use_layerscale" in message
    config = FocalNetConfig(**SMALL)
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "saved")
    assert "embed_dim is 96" in message_of(ValueError, load_checkpoint, tmp_path / "saved", variant="tiny_srf")


def test_post_layernorm_of_timm_is_told_by_its_names(tmp_path):
    path = file_of(FocalNetForImageClassification(FocalNetConfig(**SMALL, use_post_layernorm=True)), "timm", tmp_path)
    assert load_checkpoint(path, normalize_modulator=False).config.use_post_layernorm
    message = message_of(ValueError, load_checkpoint, path, normalize_modulator=False, use_post_layernorm=False)
    assert "use_post_layernorm is False by the argument, but True in the file" in message


def test_bad_arguments(tmp_path):
    path = authors_file(tmp_path)
    assert "normalise_modulator" in message_of(TypeError, load_checkpoint, path, normalise_modulator=True)
    assert "tiny_lrf" in message_of(ValueError, load_checkpoint, path, variant="tiny")
    message = message_of(ValueError, load_checkpoint, path, **SETTLED, hidden_act="nonsense")
    assert "hidden_act" in message
    assert str(path) in message

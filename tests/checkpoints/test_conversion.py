"""Converting between formats keeps every bit, and refuses what a format cannot hold."""

import logging

import pytest
import torch
import transformers
from golden import MODELS, format_of, settings_of, tensors_of
from golden import write as write_golden
from model_files import (
    CLASSES,
    DETECTION,
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
from safetensors.torch import load_file

from focalnet import FocalNetConfig, FocalNetForImageClassification, convert_checkpoint, load_checkpoint

ROUND_TRIPS = [
    ("classifier", source, over)
    for source in ("transformers", "authors", "timm")
    for over in ("transformers", "authors", "timm")
]
ROUND_TRIPS += [("base", source, over) for _, source, over in ROUND_TRIPS]
ROUND_TRIPS += [
    ("backbone", source, over)
    for source in ("transformers", "authors-detection")
    for over in ("transformers", "authors-detection")
]


@pytest.mark.parametrize(("kind", "source", "over"), ROUND_TRIPS)
def test_round_trips_keep_every_bit(kind, source, over, tmp_path):
    fields = {**SMALL, "use_layerscale": True, "use_post_layernorm_in_modulation": True, "use_post_layernorm": True}
    fields.update({"use_conv_embed": True, "normalize_modulator": True})
    if kind == "backbone":
        fields.update({**DETECTION, "stem_padding": 3})
    model = randomized(CLASSES[kind](FocalNetConfig(**fields)))
    # Several dtypes: the stem and the head keep float32.
    (model if kind == "base" else model.focalnet).encoder.to(torch.bfloat16 if kind == "base" else torch.float16)
    original = file_of(model, source, tmp_path)
    settings = {"normalize_modulator": True, "use_post_layernorm": True}
    suffix = {"transformers": "", "timm": ".safetensors"}
    between = convert_checkpoint(original, tmp_path / f"between{suffix.get(over, '.pth')}", over, **settings)
    assert (between.source_format, between.format, between.kind) == (source, over, kind)
    back = convert_checkpoint(between.path, tmp_path / f"back{suffix.get(source, '.pth')}", source, **settings)
    assert back.source_format == over
    assert_same_bits(stored(original), stored(back.path))
    assert between.tensors == len(stored(original))
    assert between.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("name", MODELS)
def test_golden_files_through_transformers_format(name, tmp_path):
    original = write_golden(name, tmp_path)
    settings = settings_of(name)
    between = convert_checkpoint(original, tmp_path / "between", **settings)
    assert between.pass_when_reading == {}
    back = convert_checkpoint(between.path, tmp_path / f"back{original.suffix}", format_of(name))
    assert_same_bits(tensors_of(name, "param"), stored(back.path))
    # config.json now tells what had to be said for the original.
    loaded = load_checkpoint(between.path).config
    for field in (*settings, "depths", "stem_padding", "out_features", "use_feature_map_norms", "num_labels"):
        assert getattr(loaded, field) == getattr(between.config, field), field


def test_transformers_reads_what_is_written(tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL, use_layerscale=True)))
    convert_checkpoint(file_of(model, "authors", tmp_path), tmp_path / "converted", **SETTLED)
    theirs = transformers.FocalNetForImageClassification.from_pretrained(tmp_path / "converted")
    assert_same_bits(model.state_dict(), theirs.state_dict())
    assert theirs.config.num_labels == 5
    ours = FocalNetForImageClassification.from_pretrained(tmp_path / "converted")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(images).logits
        assert (ours(images).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("format", ["authors", "timm"])
def test_suffix_says_how_it_is_written(format, suffix, tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    path = convert_checkpoint(file_of(model, "transformers", tmp_path), tmp_path / f"new/model{suffix}", format).path
    if suffix == ".safetensors":
        content = load_file(path)
    else:
        content = torch.load(path, weights_only=True)
        content = content["model"] if format == "authors" else content
    assert_same_bits(named(model, format), content)


def test_settings_that_a_file_does_not_record_are_reported(tmp_path, caplog):
    fields = {"normalize_modulator": True, "use_post_layernorm": True, "layer_norm_eps": 1e-6}
    source = file_of(FocalNetForImageClassification(FocalNetConfig(**SMALL, **fields)), "transformers", tmp_path)
    with caplog.at_level(logging.WARNING, logger="focalnet"):
        report = convert_checkpoint(source, tmp_path / "model.pth", "authors")
    # A reader of the authors' and of timm's files expects models that drop incomplete patches, and this one pads.
    assert report.pass_when_reading == {**fields, "drop_incomplete_patches": False}
    assert "normalize_modulator" in caplog.text
    loaded = load_checkpoint(report.path, **report.pass_when_reading)
    assert all(getattr(loaded.config, name) == value for name, value in report.pass_when_reading.items())
    report = convert_checkpoint(source, tmp_path / "model.safetensors", "timm")
    told = {"normalize_modulator": True, "layer_norm_eps": 1e-6, "drop_incomplete_patches": False}
    assert report.pass_when_reading == told
    assert "drop incomplete patches" in report.notes[0]
    assert convert_checkpoint(source, tmp_path / "copy").pass_when_reading == {}


@pytest.mark.parametrize(
    ("kind", "fields", "format", "said"),
    [
        ("backbone", DETECTION, "timm", "no place for hidden_states_norms.stage1"),
        ("backbone", DETECTION, "authors", "classifiers and models without a head"),
        ("backbone", {}, "authors", "classifiers and models without a head"),
        ("backbone", {}, "authors-detection", "use_feature_map_norms"),
        (
            "backbone",
            {"use_feature_map_norms": True, "out_features": ["stage1"]},
            "authors-detection",
            "feature_maps_before_downsampling",
        ),
        ("classifier", {}, "authors-detection", "use_feature_map_norms"),
        ("masked-image-modeling", {"encoder_stride": 8}, "authors", "no place for decoder.0.bias"),
        ("masked-image-modeling", {"encoder_stride": 8}, "timm", "embeddings.mask_token"),
        ("classifier", {"patch_size": 16}, "timm", "timm's FocalNet has patches of 4"),
        ("classifier", {"use_conv_embed": True, "stem_padding": 3}, "authors", "stem_padding=3"),
    ],
)
def test_formats_that_cannot_hold_a_model(kind, fields, format, said, tmp_path):
    source = file_of(CLASSES[kind](FocalNetConfig(**{**SMALL, **fields})), "transformers", tmp_path)
    message = message_of(ValueError, convert_checkpoint, source, tmp_path / "out.pth", format)
    assert said in message
    assert f"{format!r} cannot hold this {kind}" in message
    assert not (tmp_path / "out.pth").exists()


def test_bad_destinations(tmp_path):
    source = authors_file(tmp_path)
    for dst, format, said in (
        ("out.h5", "authors", "expected a file ending in .safetensors"),
        ("out", "timm", "expected a file ending in .safetensors"),
        ("out.safetensors", "transformers", "expected a directory"),
        ("out.pth", "onnx", "expected one of transformers, authors"),
    ):
        assert said in message_of(ValueError, convert_checkpoint, source, tmp_path / dst, format, **SETTLED)


def test_a_file_may_be_converted_onto_itself(tmp_path):
    path = authors_file(tmp_path)
    before = stored(path)
    convert_checkpoint(path, path, "authors", **SETTLED)
    assert_same_bits(before, stored(path))


def test_only_the_tensors_own_memory_is_written(tmp_path):
    """torch.save writes all the memory behind a view, and safetensors refuses shared memory."""
    path = authors_file(tmp_path)
    before = stored(path)
    flat = torch.cat([tensor.flatten() for tensor in before.values()])
    views, start = {}, 0
    for name, tensor in before.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    torch.save({"model": views}, path)
    for dst, format in (("views", "transformers"), ("views.safetensors", "timm"), ("views.pth", "authors")):
        report = convert_checkpoint(path, tmp_path / dst, format, **SETTLED)
        assert report.parameters == start
    assert_same_bits(before, stored(tmp_path / "views.pth"))

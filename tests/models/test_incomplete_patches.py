"""Images that are no whole number of patches: a file gives the result of the model that it comes from."""

import json

import pytest
import torch
import transformers
from model_files import SETTLED, SMALL, file_of, message_of, named, randomized
from safetensors.torch import save_file
from small_models import one_thread  # noqa: F401
from sources import AuthorsFocalNet, TimmFocalNet

from focalnet import (
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    convert_checkpoint,
    load_checkpoint,
    use_backend,
)

SIZES = [(72, 104), (36, 36), (35, 47), (61, 33)]
FOUR = {"embed_dim": 8, "depths": [1] * 4, "focal_levels": [2] * 4, "focal_windows": [3] * 4}
# Each source with patches that overlap and that do not.
MODELS = {
    "timm": lambda overlap: TimmFocalNet(**FOUR, use_overlap_down=overlap),
    "authors": lambda overlap: AuthorsFocalNet(**FOUR, use_conv_embed=overlap),
    "authors-detection": lambda overlap: AuthorsFocalNet(**FOUR, use_conv_embed=overlap, detection=True),
}
SETTINGS = {"timm": {"normalize_modulator": False}, "authors": SETTLED, "authors-detection": SETTLED}


def source_and_file(source, overlap, folder):
    torch.manual_seed(0)
    model = randomized(MODELS[source](overlap))
    if source == "timm":
        save_file(model.state_dict(), folder / "model.safetensors")
        return model, folder / "model.safetensors", SETTINGS[source]
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    padding = {"stem_padding": 3} if overlap and source == "authors-detection" else {}
    return model, folder / "model.pth", {**SETTINGS[source], **padding}


def outputs_of(model, images):
    outputs = model(images)
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs if isinstance(outputs, tuple) else outputs.to_tuple()[0:1])


def assert_same_outputs(model, expected, sizes=SIZES):
    for height, width in sizes:
        images = torch.randn(1, 3, height, width)
        theirs = outputs_of(expected, images)
        ours = model(images)
        ours = ours.feature_maps if hasattr(ours, "feature_maps") else [ours.logits]
        for got, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("overlap", [False, True], ids=["patches", "overlapping"])
@pytest.mark.parametrize("source", MODELS)
def test_every_size(source, overlap, tmp_path):
    expected, path, settings = source_and_file(source, overlap, tmp_path)
    model = load_checkpoint(path, **settings)
    assert model.config.drop_incomplete_patches is (None if source == "authors-detection" else True)
    with torch.no_grad():
        assert_same_outputs(model, expected)
        with use_backend("reference"):
            assert_same_outputs(model, expected)
    # With gradients: module by module.
    assert_same_outputs(model, expected, SIZES[1:])


def test_padding_would_not_do(tmp_path):
    """The sizes above tell the two ways apart."""
    expected, path, settings = source_and_file("timm", False, tmp_path)
    images = torch.randn(1, 3, 36, 36)
    with torch.no_grad():
        padded = load_checkpoint(path, **settings, drop_incomplete_patches=False)(images).logits
        wanted = expected(images)
    assert (padded - wanted).abs().max() > 0.1 * wanted.abs().max()


def timm_model():
    """timm's own, where timm is installed."""
    from focalnet.benchmark.torchvision_stub import stubbed_torchvision

    with stubbed_torchvision():
        timm = pytest.importorskip("timm")
    return randomized(timm.models.focalnet.FocalNet(**FOUR, num_classes=5))


def test_every_size_with_timm_itself(tmp_path):
    expected = timm_model()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_same_outputs(load_checkpoint(tmp_path / "model.safetensors", **SETTINGS["timm"]), expected)


def test_the_json_has_the_field_only_where_it_is_set(tmp_path):
    for value in (None, True, False):
        FocalNetConfig(**SMALL, drop_incomplete_patches=value).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert ("drop_incomplete_patches" in written) == (value is not None)
        assert FocalNetConfig.from_pretrained(tmp_path).drop_incomplete_patches is value
    assert "drop_incomplete_patches" in message_of(TypeError, FocalNetConfig, drop_incomplete_patches="yes")


@pytest.mark.parametrize("source", ["timm", "authors"])
def test_conversions_keep_the_result_or_say_that_they_cannot(source, tmp_path):
    expected, path, settings = source_and_file(source, True, tmp_path)
    between = convert_checkpoint(path, tmp_path / "between", **settings)
    assert between.pass_when_reading == {}
    assert any("transformers fill incomplete patches" in note for note in between.notes)
    back = convert_checkpoint(between.path, tmp_path / f"back{path.suffix}", source)
    assert "drop_incomplete_patches" not in back.pass_when_reading
    assert not back.notes
    with torch.no_grad():
        assert_same_outputs(load_checkpoint(between.path), expected)
        assert_same_outputs(load_checkpoint(back.path, **settings), expected)
        # transformers ignores the field, and pads.
        theirs = transformers.FocalNetForImageClassification.from_pretrained(between.path).eval()
        images = torch.randn(1, 3, 64, 96)
        torch.testing.assert_close(theirs(images).logits, expected(images), rtol=1e-4, atol=1e-4)


def test_a_configuration_that_is_given_may_leave_it_open(tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    path = file_of(model, "timm", tmp_path)
    for value, expected in ((None, True), (True, True), (False, False)):
        config = FocalNetConfig(**SMALL, drop_incomplete_patches=value)
        loaded = FocalNetForImageClassification.from_pretrained(path, config=config)
        assert loaded.config.drop_incomplete_patches is expected
    assert named(loaded, "timm").keys() == named(model, "timm").keys()


def test_images_without_a_whole_patch_are_refused():
    model = FocalNetForImageClassification(FocalNetConfig(**FOUR, drop_incomplete_patches=True)).eval()
    for images in (torch.randn(1, 3, 3, 64), torch.randn(1, 3, 20, 20)):
        message = message_of(ValueError, model, images)
        assert "pixel_values: expected larger images" in message
        with torch.no_grad():
            assert message_of(ValueError, model, images) == message


def test_masked_image_modelling_needs_whole_patches():
    config = FocalNetConfig(**{**SMALL, "encoder_stride": 8}, drop_incomplete_patches=True)
    model = FocalNetForMaskedImageModeling(config).eval()
    mask = torch.ones(1, 81, dtype=torch.bool)
    message = message_of(ValueError, model, torch.randn(1, 3, 36, 36), bool_masked_pos=mask)
    assert "pixel_values: expected a height and a width of whole patches" in message
    assert model(torch.randn(1, 3, 40, 40), bool_masked_pos=torch.ones(1, 100, dtype=torch.bool)).loss > 0

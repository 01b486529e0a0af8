"""``focalnet classify``: what it prints, and its exit codes."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from command_line import (
    LABELS,
    assert_one_line_error,
    classify,
    run,
    save_photos,
    summary,
)
from PIL import Image
from skimage import data

from focalnet import FocalNetBackbone, FocalNetConfig, FocalNetForImageClassification
from focalnet.backends import extension
from focalnet.cli import images
from focalnet.cli.images import published_processor
from focalnet.cli.output import Bar


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos")


def unfolded(table):
    """A path is folded to the table's width, wherever that is in its name."""
    return table.replace("\n", "")


def test_top_k_is_that_of_transformers_pipeline(model_folder, photos):
    from transformers import AutoImageProcessor, pipeline

    model = FocalNetForImageClassification.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    expected = pipeline("image-classification", model=model, image_processor=processor)(
        str(photos / "cat.png"), top_k=5
    )
    document, code = classify(model_folder, photos / "cat.png")
    assert code == 0
    (image,) = document["images"]
    assert [p["label"] for p in image["predictions"]] == [p["label"] for p in expected]
    assert [p["probability"] for p in image["predictions"]] == pytest.approx([p["score"] for p in expected], rel=1e-5)
    assert all(LABELS[p["index"]] == p["label"] for p in image["predictions"])


def test_top_k_is_limited_to_the_labels_there_are(model_folder, photos):
    document, _ = classify(model_folder, photos / "cat.png", "--top-k", 100)
    (image,) = document["images"]
    assert sorted(p["label"] for p in image["predictions"]) == sorted(LABELS)
    assert sum(p["probability"] for p in image["predictions"]) == pytest.approx(1)


def test_table_shows_every_label_as_it_is(model_folder, photos):
    result = run("classify", photos / "cat.png", "--model", model_folder, "--top-k", 7)
    assert result.exit_code == 0
    assert "cat.png" in unfolded(result.stdout)
    assert all(label in result.stdout for label in LABELS)
    assert result.stdout.count("%") == 7
    assert result.stderr == ""


def test_folder_is_searched_recursively_for_images_only(model_folder, photos):
    document, code = classify(model_folder, photos)
    assert code == 0
    assert set(summary(document)) == {"cat.png", "face.jpg", "coffee.PNG", "rocket.webp", "upside down.png"}
    assert document["errors"] == []


def test_quoted_globs_are_expanded_and_each_file_is_taken_once(model_folder, photos):
    document, code = classify(model_folder, photos / "*.png", photos / "**" / "*.png", photos / "cat.png")
    assert code == 0
    names = [os.path.basename(image["path"]) for image in document["images"]]
    assert names == ["cat.png", "upside down.png"]


def test_file_whose_name_looks_like_a_glob_or_markup_is_a_file(model_folder, photos):
    odd = photos / "[red]*.png"
    (photos / "cat.png").rename(odd)
    result = run("classify", odd, "--model", model_folder)
    assert result.exit_code == 0
    assert "[red]*.png" in unfolded(result.stdout)


def test_batch_size_does_not_change_results(model_folder, photos):
    one, _ = classify(model_folder, photos, "--batch-size", 1)
    many, _ = classify(model_folder, photos, "--batch-size", 4)
    assert summary(one) == summary(many)
    probabilities = [
        [p["probability"] for image in document["images"] for p in image["predictions"]] for document in (one, many)
    ]
    assert probabilities[0] == pytest.approx(probabilities[1], rel=1e-5)


@pytest.mark.parametrize("as_json", [True, False])
def test_broken_and_missing_files_are_reported_and_skipped(model_folder, photos, as_json):
    whole = (photos / "face.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.png").write_text("no image at all")
    arguments = [photos, photos / "missing.jpg", "--model", model_folder, "--batch-size", 2]
    result = run("classify", *arguments, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    bad = ["cut.jpg", "empty.png", "text.png", "missing.jpg"]
    assert result.stderr.count("\n") == len(bad)
    assert all(name in result.stderr for name in bad)
    if as_json:
        document = json.loads(result.stdout)
        assert sorted(os.path.basename(error["path"]) for error in document["errors"]) == sorted(bad)
        assert len(document["images"]) == 5
    else:
        assert unfolded(result.stdout).count("cat.png") == 1
        assert not any(name in result.stdout for name in bad)


def test_every_kind_of_image_is_read(model_folder, tmp_path):
    cat = Image.fromarray(data.chelsea()).resize((90, 60))
    cat.save(tmp_path / "rgb.png")
    cat.convert("L").save(tmp_path / "grey.png")
    cat.convert("RGBA").save(tmp_path / "alpha.png")
    cat.convert("LA").save(tmp_path / "grey_alpha.png")
    cat.convert("P").save(tmp_path / "palette.gif")
    cat.convert("1").save(tmp_path / "bits.png")
    cat.convert("CMYK").save(tmp_path / "cmyk.jpg")
    cat.resize((1, 1)).save(tmp_path / "dot.png")
    document, code = classify(model_folder, tmp_path)
    assert (code, len(document["images"]), document["errors"]) == (0, 8, [])
    same = summary(document)
    assert same["alpha.png"] == same["rgb.png"]


def test_rotation_in_exif_is_undone(tmp_path):
    upright = Image.fromarray(data.chelsea()).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "turned.png"), upright)


def test_strip_that_would_need_gigabytes_is_skipped(model_folder, tmp_path):
    Image.new("RGB", (20000, 1)).save(tmp_path / "strip.png")
    document, code = classify(model_folder, tmp_path)
    assert code == 1
    assert "20000 x 1" in document["errors"][0]["error"]


def test_published_preprocessing_is_256_to_224_bilinear_with_imagenet_statistics():
    processor = published_processor(FocalNetConfig()).to_dict()
    assert processor["size"] == {"shortest_edge": 256}
    assert processor["crop_size"] == {"height": 224, "width": 224}
    assert processor["resample"] == Image.Resampling.BILINEAR
    assert tuple(processor["image_mean"]) == (0.485, 0.456, 0.406)
    assert tuple(processor["image_std"]) == (0.229, 0.224, 0.225)


def test_model_without_processor_gets_the_published_preprocessing(model_folder, photos, tmp_path):
    copy = tmp_path / "bare"
    FocalNetForImageClassification.from_pretrained(model_folder).save_pretrained(copy)
    assert classify(copy, photos)[0]["images"] == classify(model_folder, photos)[0]["images"]


def test_several_labels_at_once_have_independent_probabilities(photos, tmp_path):
    config = FocalNetConfig(
        embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], hidden_sizes=[16, 16],
        image_size=32, num_labels=3, problem_type="multi_label_classification",
    )  # fmt: skip
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "multi")
    document, _ = classify(tmp_path / "multi", photos / "cat.png")
    probabilities = [p["probability"] for p in document["images"][0]["predictions"]]
    assert probabilities == pytest.approx([0.5] * 3, abs=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_and_stays_close(model_folder, photos, dtype):
    exact, _ = classify(model_folder, photos / "cat.png", "--top-k", 7)
    low, code = classify(model_folder, photos / "cat.png", "--top-k", 7, "--dtype", dtype)
    assert code == 0
    of_label = [
        {p["label"]: p["probability"] for p in document["images"][0]["predictions"]} for document in (exact, low)
    ]
    assert of_label[1] == pytest.approx(of_label[0], abs=0.05)


def test_automatic_dtype_is_bfloat16_where_the_processor_computes_in_it_and_is_said(model_folder, photos):
    if extension.missing() is None and torch.ops.focalnet.cpu_isa() in ("avx512_bf16", "amx"):
        expected = "bfloat16"
    else:
        expected = "float32"
    arguments = ("classify", photos / "cat.png", "--model", model_folder, "--device", "cpu", "--json", "--dtype")
    automatic, named = run(*arguments, "auto"), run(*arguments, expected)
    assert f"computing in {expected} on cpu" in automatic.stderr and "computing in" not in named.stderr
    assert automatic.stdout == named.stdout


def test_backend_can_be_chosen(model_folder, photos):
    automatic, _ = classify(model_folder, photos / "cat.png")
    reference, code = classify(model_folder, photos / "cat.png", "--backend", "reference")
    assert code == 0
    assert summary(reference) == summary(automatic)


@pytest.mark.parametrize("watched", [True, False])
def test_bar_is_on_stderr_and_only_where_somebody_watches(monkeypatch, capsys, watched):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    with Bar("classifying", 3, wanted=True) as bar, bar.aside(3):
        print("table")
    stdout, stderr = capsys.readouterr()
    assert stdout == "table\n"
    assert ("classifying" in stderr) == watched


def test_no_image_at_all_is_a_usage_error(model_folder, tmp_path):
    result = run("classify", tmp_path, tmp_path / "*.png", "--model", model_folder)
    assert result.exit_code == 2
    assert "no image found" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_missing_model_is_one_clear_line(photos):
    result = run("classify", photos, "--model", "./no/such/model.pth")
    assert_one_line_error(result, "./no/such/model.pth", "expected a file, a directory")


def test_hub_model_without_network_is_one_clear_line_at_once(photos, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = run("classify", photos, "--model", "nobody/no-such-focalnet")
    assert_one_line_error(result, "nobody/no-such-focalnet", "Hugging Face")


def test_damaged_model_file_is_one_clear_line(photos, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    result = run("classify", photos, "--model", tmp_path / "model.safetensors")
    assert_one_line_error(result, "model.safetensors")


@pytest.mark.parametrize(
    "given, words",
    [
        ("other", ["expected 'focalnet'", "resnet", "ResNetForImageClassification"]),
        ("timms", ["expected 'focalnet'", "resnet50"]),
        ("other/config.json", ["this is JSON", "pass its folder"]),
        ("lonely/config.json", ["this is JSON", "holds no weights"]),
        ("photos", ["folder of images"]),
        ("photos/cat.png", ["this is an image"]),
        ("runs", ["no weights itself", "checkpoint-10"]),
        ("lonely", ["found none"]),
    ],
)
@pytest.mark.parametrize("command", ["classify", "convert"])
def test_what_is_no_checkpoint_is_called_by_its_name(command, given, words, photos, tmp_path):
    for folder in ("other", "timms", "lonely", "runs/checkpoint-10"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
    of_others = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (tmp_path / "other" / "config.json").write_text(json.dumps(of_others))
    (tmp_path / "timms" / "config.json").write_text('{"architecture": "resnet50"}')
    (tmp_path / "lonely" / "config.json").write_text('{"model_type": "focalnet"}')
    (tmp_path / "lonely" / "model.safetensors").unlink()
    path = tmp_path / given
    arguments = [photos, "--model", path] if command == "classify" else [path, tmp_path / "out"]
    assert_one_line_error(run(command, *arguments), str(path), *words)


def test_backbone_is_refused_with_what_it_is(photos, tmp_path):
    config = FocalNetConfig(embed_dim=8, depths=[1, 1, 1, 1])
    FocalNetBackbone(config).save_pretrained(tmp_path / "backbone")
    result = run("classify", photos, "--model", tmp_path / "backbone")
    assert_one_line_error(result, "expected a classifier", "FocalNetBackbone")


def test_model_of_grey_images_is_refused(photos, tmp_path):
    config = FocalNetConfig(embed_dim=8, depths=[1, 1, 1, 1], num_channels=1)
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "grey")
    assert_one_line_error(run("classify", photos, "--model", tmp_path / "grey"), "num_channels")


def test_unknown_backend_and_absent_device_are_one_clear_line(model_folder, photos, monkeypatch):
    result = run("classify", photos, "--model", model_folder, "--backend", "abacus")
    assert_one_line_error(result, "--backend", "reference", "abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line_error(run("classify", photos, "--model", model_folder, "--device", "cuda"), "--device cpu")


@pytest.mark.parametrize("flag", ["--top-k", "--batch-size"])
def test_zero_is_no_count(model_folder, photos, flag):
    assert run("classify", photos, "--model", model_folder, flag, 0).exit_code == 2


def test_classify_takes_what_a_file_does_not_tell(model_folder, photos, tmp_path):
    run("convert", model_folder, tmp_path / "model.pth", "--format", "authors")
    assert_one_line_error(run("classify", photos, "--model", tmp_path / "model.pth"), "use_post_layernorm", "--set")
    told = ["--set", "use_post_layernorm=false", "--set", "image_size=32", "--set", "normalize_modulator=false"]
    document, code = classify(tmp_path / "model.pth", photos, *told)
    assert code == 0
    indices = [[p["index"] for p in image["predictions"]] for image in document["images"]]
    original, _ = classify(model_folder, photos)
    assert indices == [[p["index"] for p in image["predictions"]] for image in original["images"]]

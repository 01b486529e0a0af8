"""``focalnet evaluate``: accuracy on a folder of classes, as counted by hand; resuming; what it refuses."""

import importlib
import json

import pytest
import torch
from command_line import LABELS, assert_one_line_error, run
from PIL import Image
from skimage import data
from transformers import AutoImageProcessor

from focalnet import FocalNetConfig, FocalNetForImageClassification
from focalnet.cli.evaluate import Accuracy
from focalnet.cli.images import read_image

PICTURES = (data.chelsea, data.astronaut, data.coffee, data.rocket)


def class_folders(root, names, images=4):
    """``images`` different pictures for each class."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(images):
            pixels = PICTURES[(index + k) % len(PICTURES)]()[:: 1 if index % 2 else -1]
            Image.fromarray(pixels).rotate(30 * index).resize((60, 40)).save(root / name / f"{k}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "val", LABELS)


def evaluate(*arguments):
    result = run("evaluate", "--json", *arguments)
    return json.loads(result.stdout), result.exit_code


def expected_accuracy(model_folder, folder, label_of_class):
    """Image by image, with transformers' processor."""
    model = FocalNetForImageClassification.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    hits = []
    for path in sorted(folder.rglob("*.png")):
        with torch.no_grad():
            logits = model(**processor(read_image(path), return_tensors="pt")).logits[0]
        order = logits.argsort(descending=True).tolist()
        hits.append(order.index(label_of_class(path.parent.name)))
    return sum(hit == 0 for hit in hits) / len(hits), sum(hit < 5 for hit in hits) / len(hits)


@pytest.mark.parametrize("names", ["labels", "numbers", "alphabetical"])
def test_accuracy_is_that_counted_image_by_image(model_folder, tmp_path, names):
    folders = {
        "labels": LABELS,
        "numbers": [str(index) for index in range(len(LABELS))],
        "alphabetical": [f"n{index:02}" for index in range(len(LABELS))],
    }[names]
    folder = class_folders(tmp_path / "val", folders)
    document, code = evaluate(folder, "--model", model_folder, "--batch-size", 3)
    expected = expected_accuracy(model_folder, folder, folders.index)
    assert (code, document["images"], document["errors"]) == (0, 28, [])
    assert (document["top1"], document["top5"]) == pytest.approx(expected)
    assert 0 < document["top5"] < 1, "or the test could not tell one order of labels from another"
    assert document["images_per_second"] > 0


def test_some_of_the_labels_are_enough_where_folders_are_named_like_them(model_folder, tmp_path):
    folder = class_folders(tmp_path / "val", LABELS[2:4])
    document, _ = evaluate(folder, "--model", model_folder)
    assert (document["top1"], document["top5"]) == expected_accuracy(model_folder, folder, LABELS.index)


def test_top1_and_top5_are_counts_over_images():
    assert Accuracy.of([0, 0, 1, 4, None]) == Accuracy(images=5, top1=0.4, top5=0.8)


def test_interrupted_run_goes_on_from_its_record(model_folder, folder, tmp_path, monkeypatch):
    record = tmp_path / "record.jsonl"
    arguments = [folder, "--model", model_folder, "--record", record, "--batch-size", 4]
    whole, _ = evaluate(*arguments[:3])

    def until_the_third_batch(*args):
        for count, batch in enumerate(classify_files(*args)):
            if count == 2:
                raise KeyboardInterrupt
            yield batch

    evaluation = importlib.import_module("focalnet.cli.evaluate")  # as an attribute it is the command
    classify_files = evaluation.classify_files
    monkeypatch.setattr(evaluation, "classify_files", until_the_third_batch)
    interrupted = run("evaluate", *arguments)
    assert interrupted.exit_code == 130
    assert "8 of 28" in interrupted.stderr
    assert "the same command goes on" in interrupted.stderr

    record.write_bytes(record.read_bytes()[:-3])  # killed while it wrote
    monkeypatch.setattr(evaluation, "classify_files", classify_files)
    document, code = evaluate(*arguments)
    assert (code, document["images_this_run"]) == (0, 28 - 7)
    assert (document["images"], document["top1"], document["top5"]) == (28, whole["top1"], whole["top5"])

    again, _ = evaluate(*arguments)
    assert again["images_this_run"] == 0
    assert (again["images"], again["top1"], again["top5"]) == (28, whole["top1"], whole["top5"])


def test_record_of_another_run_is_refused_and_kept(model_folder, folder, tmp_path):
    record = tmp_path / "record.jsonl"
    evaluate(folder, "--model", model_folder, "--record", record)
    content = record.read_bytes()
    result = run("evaluate", folder, "--model", model_folder, "--record", record, "--dtype", "bfloat16")
    assert_one_line_error(result, "--record", "dtype float32", "bfloat16")
    assert record.read_bytes() == content


def test_file_that_is_no_record_is_refused_and_kept(model_folder, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    result = run("evaluate", folder, "--model", model_folder, "--record", tmp_path / "notes.txt")
    assert_one_line_error(result, "--record", "notes.txt", "not a record")
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_unreadable_images_are_reported_and_left_out(model_folder, folder):
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    document, code = evaluate(folder, "--model", model_folder)
    assert code == 1
    assert document["images"] == 28
    assert [error["path"].endswith("broken.png") for error in document["errors"]] == [True]


def test_backend_does_not_change_the_result(model_folder, folder):
    automatic, _ = evaluate(folder, "--model", model_folder)
    reference, _ = evaluate(folder, "--model", model_folder, "--backend", "reference")
    assert (automatic["top1"], automatic["top5"]) == (reference["top1"], reference["top5"])


def test_table_has_the_figures(model_folder, folder):
    document, _ = evaluate(folder, "--model", model_folder)
    result = run("evaluate", folder, "--model", model_folder)
    assert result.exit_code == 0
    assert f"{document['top1']:.2%}" in result.stdout
    assert f"{document['top5']:.2%}" in result.stdout
    assert "images a second" in result.stdout


def test_folders_that_are_not_the_models_classes_are_refused(model_folder, tmp_path):
    folder = class_folders(tmp_path / "val", ["cat", "zebra"])
    result = run("evaluate", folder, "--model", model_folder)
    assert_one_line_error(result, "DIR", "'cat', 'zebra'", "exactly 7")


@pytest.mark.parametrize("make", ["missing", "empty", "no images"])
def test_nothing_to_evaluate_is_refused(model_folder, tmp_path, make):
    folder = tmp_path / "val"
    if make != "missing":
        folder.mkdir()
    if make == "no images":
        for name in LABELS:
            (folder / name).mkdir()
    assert_one_line_error(run("evaluate", folder, "--model", model_folder), "DIR", "val")


def test_model_of_several_labels_at_once_is_refused(tmp_path, folder):
    config = FocalNetConfig(embed_dim=8, depths=[1, 1, 1, 1], problem_type="multi_label_classification", num_labels=7)
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "multi")
    assert_one_line_error(run("evaluate", folder, "--model", tmp_path / "multi"), "--model", "one label")

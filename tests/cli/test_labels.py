"""Names of ImageNet's classes for the authors' and timm's files; names and WordNet ids in the command line."""

import json

import pytest
import torch
from command_line import LABELS, assert_one_line_error, run, save_model, save_photos
from model_files import SETTLED, SMALL, file_of, named, randomized
from PIL import Image
from skimage import data

from focalnet import FocalNetConfig, FocalNetForImageClassification, convert_checkpoint, load_checkpoint
from focalnet.checkpoints.imagenet import class_ids, class_names
from focalnet.checkpoints.reading import interpret


def test_the_thousand_classes_come_first_and_the_rest_by_id():
    ids, names = class_ids(21842), class_names(21842)
    assert len(set(ids)) == len(names) == 21842
    assert class_ids(1000) == ids[:1000] == sorted(ids[:1000])
    assert ids[1000:] == sorted(ids[1000:])
    assert class_names(1000) == names[:1000]
    # 850, the teddy bear, is the class that ImageNet-22K lacks, as the authors say.
    known = {0: "tench, Tinca tinca", 281: "tabby, tabby cat", 850: "teddy, teddy bear", 999: "toilet tissue, toilet"}
    assert all(names[index].startswith(name) for index, name in known.items())
    assert (ids[0], ids[850], ids[1000], ids[-1]) == ("n01440764", "n04399382", "n00004475", "n15102894")
    assert class_names(1001) is class_ids(None) is None


def classifier_state(num_labels, naming):
    with torch.device("meta"):
        return named(FocalNetForImageClassification(FocalNetConfig(**{**SMALL, "num_labels": num_labels})), naming)


@pytest.mark.parametrize("naming", ["authors", "timm"])
@pytest.mark.parametrize("count", [1000, 21842])
def test_files_of_imagenet_have_its_names(count, naming):
    settings = SETTLED if naming == "authors" else {"normalize_modulator": False}
    config = interpret(classifier_state(count, naming), "memory", **settings).config
    assert list(config.id2label.values()) == class_names(count)
    assert config.id2label[config.label2id["tench, Tinca tinca"]] == "tench, Tinca tinca"
    mine = {index: f"mine {index}" for index in range(count)}
    assert interpret(classifier_state(count, naming), "memory", **settings, id2label=mine).config.id2label == mine
    other = interpret(classifier_state(count + 1, naming), "memory", **settings).config
    assert other.id2label[0] == "LABEL_0"


def test_names_are_converted(tmp_path):
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**{**SMALL, "num_labels": 1000})))
    report = convert_checkpoint(file_of(model, "timm", tmp_path), tmp_path / "folder", normalize_modulator=False)
    assert load_checkpoint(report.path).config.id2label[1] == "goldfish, Carassius auratus"


FOUR = {"embed_dim": 8, "depths": [1] * 4, "image_size": 32, "initializer_range": 0.2}


def save_classifier(folder, count):
    torch.manual_seed(1)
    FocalNetForImageClassification(FocalNetConfig(**FOUR, num_labels=count)).save_pretrained(folder)
    return folder


def class_folders(root, names):
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.fromarray(data.chelsea()).rotate(40 * index).resize((40, 40)).save(root / name / "picture.png")
    return root


def evaluated(folder, model, *arguments):
    result = run("evaluate", "--json", folder, "--model", model, *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("count", [1000, 21842])
def test_folders_named_by_wordnet_id(count, tmp_path):
    """Folders of ImageNet-1K, for models of 1K and of 22K: four of them, so their order could not tell the classes."""
    ids = [class_ids(21842)[index] for index in (7, 281, 850, 999)]
    folder = class_folders(tmp_path / "val", ids)
    model = save_classifier(tmp_path / "model", count)
    classifier = load_checkpoint(model)
    with torch.no_grad():
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.zero_()
        classifier.classifier.bias[[281, 500, 501, 502, 503]] = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0])
    classifier.save_pretrained(model)
    everything = evaluated(folder, model)
    assert everything["top1"] == 0
    assert everything["top5"] == 0.25
    among = evaluated(folder, model, "--among-folders")
    assert among["top1"] == 0.25
    assert among["top5"] == 1
    assert among["among"] == f"4 of {count} classes"


LABEL_FILES = {
    "lines": "\n".join(f"name {index}" for index in range(7)) + "\n",
    "lines, Windows": "\ufeff" + "\r\n".join(f"name {index}" for index in range(7)),
    "JSON list": json.dumps([f"name {index}" for index in range(7)]),
    "JSON object": json.dumps({str(index): f"name {index}" for index in range(7)}),
    "Kaggle": "\n".join(f"n0000000{index} name {index}" for index in range(7)),
    "Keras": json.dumps({str(index): [f"n0000000{index}", f"name {index}"] for index in range(7)}),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_labels_from_a_file(kind, tmp_path):
    model = save_model(tmp_path / "model")
    file = tmp_path / "labels"
    file.write_bytes(LABEL_FILES[kind].encode())
    photos = save_photos(tmp_path / "photos")
    document = json.loads(run("classify", photos, "--model", model, "--labels", file, "--json").stdout)
    predictions = [one for image in document["images"] for one in image["predictions"]]
    assert all(one["label"] == f"name {one['index']}" for one in predictions)
    folder = class_folders(tmp_path / "val", ["name 2", "name 4"])
    by_name = evaluated(folder, model, "--labels", file)
    by_label = evaluated(class_folders(tmp_path / "same", [LABELS[2], LABELS[4]]), model)
    assert (by_name["top1"], by_name["top5"]) == (by_label["top1"], by_label["top5"])
    if kind in ("Kaggle", "Keras"):
        by_id = evaluated(class_folders(tmp_path / "ids", ["n00000002", "n00000004"]), model, "--labels", file)
        assert (by_id["top1"], by_id["top5"]) == (by_label["top1"], by_label["top5"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\nb\n", "expected 7 labels, one for each output of the model, got 2"),
        (b"", "got 0"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b'["a", 1]', "expected a JSON list of names"),
        (b'{"a": "b"}', "from 0, 1, ... to names"),
        (b'["a"', "expected a JSON list"),
        (None, "cannot be read"),
    ],
)
def test_bad_label_files(content, said, tmp_path):
    model = save_model(tmp_path / "model")
    file = tmp_path / "labels.txt"
    if content is not None:
        file.write_bytes(content)
    result = run("classify", save_photos(tmp_path / "photos"), "--model", model, "--labels", file)
    assert_one_line_error(result, "--labels", "labels.txt", said)

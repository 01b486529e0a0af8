"""What a run writes is read by everything that reads checkpoints, and gives what the run said it does."""

import json

import pytest
import torch
import transformers
from command_line import classify, offline_and_undone, run
from PIL import Image
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, PLAIN, class_folders, train, weights

from focalnet import (
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    convert_checkpoint,
    load_checkpoint,
)
from focalnet.checkpoints.imagenet import class_ids
from focalnet.training import pretrain
from focalnet.training.models import Start, classifier

SETTINGS = PLAIN.but(epochs=4, ema=0.9)


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, train(data, folder, SETTINGS)


@pytest.fixture(scope="module")
def held_out(data, tmp_path_factory):
    """What the run held out, as folders: every fifth image of each class."""
    root = tmp_path_factory.mktemp("held-out")
    for name in ("blue", "red"):
        (root / name).mkdir()
        for index in range(4, 20, 5):
            (root / name / f"{index:02d}.png").write_bytes((data / name / f"{index:02d}.png").read_bytes())
    return root


def test_evaluate_counts_the_accuracy_that_the_run_reports(trained, held_out):
    folder, summary = trained
    facts = json.loads(run("evaluate", held_out, "--model", folder, "--json").stdout)
    assert (facts["images"], facts["top1"]) == (summary["held_out"], summary["accuracy"]) == (8, 1.0)


def test_classify_names_the_labels(trained, held_out):
    document, _ = classify(trained[0], held_out / "red")
    assert {image["predictions"][0]["label"] for image in document["images"]} == {"red"}


def test_transformers_loads_it_and_agrees(trained):
    theirs = transformers.FocalNetForImageClassification.from_pretrained(trained[0])
    assert theirs.config.id2label == {0: "blue", 1: "red"}
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(theirs(pixels).logits, load_checkpoint(trained[0])(pixels).logits)
    assert transformers.AutoImageProcessor.from_pretrained(trained[0], backend="pil").crop_size["height"] == 16


@pytest.mark.parametrize("format", ["authors", "timm"])
def test_it_converts_and_comes_back(format, trained, tmp_path):
    done = convert_checkpoint(trained[0], tmp_path / "there.pth", format)
    again = load_checkpoint(tmp_path / "there.pth", **done.pass_when_reading)
    for name, tensor in weights(trained[0]).items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_averaged_weights_are_what_is_written(data, trained, tmp_path):
    train(data, tmp_path / "out", SETTINGS.but(ema=0.0))
    plain = weights(tmp_path / "out")
    assert any(not torch.equal(plain[name], tensor) for name, tensor in weights(trained[0]).items())


def test_card_summary_and_curves(trained):
    folder, summary = trained
    card = (folder / "README.md").read_text()
    assert "100.00% (0 errors of 8)" in card and "seed 0" in card and "| learning_rate | 0.003 |" in card
    assert json.loads((folder / "summary.json").read_text())["steps"] == summary["steps"] == 16
    assert Image.open(folder / "curves.png").size[0] > 600


def test_pretrained_weights_start_a_classifier(data, tmp_path):
    summary = train(data, tmp_path / "simmim", PLAIN, task=pretrain)
    assert isinstance(load_checkpoint(tmp_path / "simmim"), FocalNetForMaskedImageModeling)
    start = Start(str(tmp_path / "simmim"))
    train(data, tmp_path / "out", PLAIN.but(learning_rate=1e-12, epochs=1), start=start)
    before, after = weights(tmp_path / "simmim"), weights(tmp_path / "out")
    name = "focalnet.encoder.stages.0.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(after[name], before[name])
    assert summary["mean_colour_loss"] > 0


def test_pretraining_takes_any_image_size(data, tmp_path):
    """20 is no multiple of the network's stride 8: the stem and the downsampling pad, the reconstruction is cut."""
    summary = train(data, tmp_path / "out", PLAIN.but(image_size=20), task=pretrain)
    assert 0 < summary["held_out_loss"] < 10 and 0 < summary["mean_colour_loss"] < 10
    model = load_checkpoint(tmp_path / "out")
    assert model(torch.randn(1, 3, 20, 20)).reconstruction.shape == (1, 3, 20, 20)


def test_tensorboard_gets_losses_and_accuracy(trained):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/accuracy"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/accuracy")[-1].value == trained[1]["accuracy"]


def test_head_keeps_the_rows_of_labels_that_it_knows(tmp_path):
    torch.manual_seed(1)
    config = FocalNetConfig(**CONFIG, image_size=16, id2label={0: "red", 1: "white", 2: "blue"})
    old = FocalNetForImageClassification(config)
    old.save_pretrained(tmp_path / "old")
    data = class_folders(tmp_path / "data", ("blue", "green", "red"), images=10)
    summary = train(
        data, tmp_path / "out", PLAIN.but(epochs=1, learning_rate=1e-12), start=Start(str(tmp_path / "old"))
    )
    assert summary["head"] == "2 of 3 outputs kept, by their labels"
    rows = weights(tmp_path / "out")["classifier.weight"]
    torch.testing.assert_close(rows[[0, 2]], old.classifier.weight.detach()[[2, 0]])


def test_resolution_may_change(data, trained, tmp_path):
    summary = train(data, tmp_path / "out", PLAIN.but(image_size=24, epochs=1), start=Start(str(trained[0])))
    assert load_checkpoint(tmp_path / "out").config.image_size == 24
    assert summary["accuracy"] == 1.0


def test_json_is_all_that_stdout_holds(data, tmp_path):
    config = [f"--set={name}={value}" for name, value in CONFIG.items()]
    options = ["--recipe=digits", "--image-size=16", "--batch-size=8", "--epochs=1", "--json"]
    result = run("finetune", data, "--output", tmp_path / "out", *config, *options)
    assert json.loads(result.stdout)["images"] == 32
    assert result.stderr == ""


def test_one_line_an_epoch(data, tmp_path):
    config = [f"--set={name}={value}" for name, value in CONFIG.items()]
    options = ["--recipe=digits", "--image-size=16", "--batch-size=8", "--epochs=3"]
    result = run("finetune", data, "--output", tmp_path / "out", *config, *options)
    first, *epochs, last, wrote = result.stdout.splitlines()
    assert first.startswith("training on 32 images of 2 classes (head: new), 8 held out; ")
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    assert last.startswith("done: 3 epochs in ") and "on 8 held-out images" in last
    assert wrote == f"wrote {tmp_path / 'out'}: model, README.md, curves.png, summary.json"


def test_22k_head_keeps_the_rows_of_wordnet_ids(tmp_path):
    old = FocalNetForImageClassification(FocalNetConfig(**CONFIG, image_size=16, num_labels=21842))
    old.save_pretrained(tmp_path / "old")
    labels = class_ids(1000)
    model, places, head = classifier(Start(str(tmp_path / "old")), labels, PLAIN)
    assert head == "1000 of 1000 outputs kept, by their labels"
    assert places == list(range(1000))
    assert torch.equal(model.classifier.weight, old.classifier.weight[:1000])
    assert model.config.id2label[0] == "tench, Tinca tinca"

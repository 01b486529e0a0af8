"""The model that comes with the package, and that the data inside teaches: quick versions of what its card claims."""

import json

import pytest
import torch
import transformers
from command_line import classify, offline_and_undone, run
from PIL import Image
from safetensors.torch import load_file
from small_models import one_thread  # noqa: F401
from small_runs import reader, train

import focalnet
from focalnet.pretrained import shipped
from focalnet.training import finetune, load_recipe, pretrain
from focalnet.training.checking import image_of
from focalnet.training.models import Start
from focalnet.training.sources import load_source

FOLDER = shipped("digits")


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


@pytest.fixture(scope="module")
def held_out():
    table = load_source("digits", reader(), labelled=True).held_out
    processor = transformers.AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    images = [image_of(cell, reader()) for cell in table["image"]]
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(table["label"][:])


@pytest.mark.parametrize("library", ["focalnet", "transformers"])
def test_it_reads_the_digits_that_were_held_out(library, held_out):
    model = (
        focalnet.load_checkpoint("digits")
        if library == "focalnet"
        else transformers.FocalNetForImageClassification.from_pretrained(FOLDER).eval()
    )
    pixels, labels = held_out
    with torch.no_grad():
        accuracy = (model(pixels).logits.argmax(-1) == labels).double().mean().item()
    assert accuracy >= 0.985
    card = (FOLDER / "README.md").read_text()
    assert f"{accuracy:.2%}" in card


def test_it_is_small_and_has_its_card():
    assert (FOLDER / "model.safetensors").stat().st_size < 2**20
    assert set(load_file(FOLDER / "model.safetensors")) == set(focalnet.load_checkpoint("digits").state_dict())
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("scikit-learn", "CC BY 4.0", "Recipe: digits", "seed 0", "355 held out"))
    assert json.loads((FOLDER / "config.json").read_text())["id2label"]["7"] == "7"


def test_command_line_reads_a_scan_by_its_name(tmp_path):
    cell = load_source("digits", reader(), labelled=True).held_out[3]
    image_of(cell["image"], reader()).resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "scan.png")
    document, code = classify("digits", tmp_path / "scan.png")
    assert (code, document["images"][0]["predictions"][0]["label"]) == (0, str(cell["label"]))


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert run("classify", "x.png", "--model", "digits").exit_code == 2
    with pytest.raises(FileNotFoundError, match="digits: expected one of model"):
        focalnet.load_checkpoint("digits")


def test_a_few_epochs_of_its_recipe_already_read_most_digits(tmp_path):
    recipe = load_recipe("digits")
    settings = recipe.settings.but(epochs=6, warmup_epochs=1)
    summary = train("digits", tmp_path / "out", settings, task=finetune, start=Start(config=recipe.config))
    assert summary["accuracy"] > 0.93


def test_masked_photographs_are_predicted_better_than_by_their_mean_colour_by_half(tmp_path):
    recipe = load_recipe("photographs")
    settings = recipe.settings.but(epochs=8)
    summary = train("photographs", tmp_path / "out", settings, task=pretrain, start=Start(config=recipe.config))
    assert summary["held_out_loss"] < 0.5 * summary["mean_colour_loss"]

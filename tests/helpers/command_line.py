"""Helpers for tests of the command line: a small model, photographs, and functions that run commands."""

import json
import logging
import os
from contextlib import contextmanager

import torch
from PIL import Image
from skimage import data
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from focalnet import FocalNetConfig, FocalNetForImageClassification, convert_checkpoint
from focalnet.cli import app
from focalnet.cli.images import published_processor

LABELS = ["cat", "dog", "[bold]fox", "owl", "ant", "bee", "eel"]


@contextmanager
def offline_and_undone(monkeypatch):
    """A context without network. Afterwards the process-wide settings that a command changes are restored."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity = transformers_logging.get_verbosity()
    level = logging.getLogger(convert_checkpoint.__module__).level
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    logging.getLogger(convert_checkpoint.__module__).setLevel(level)


def save_model(folder):
    """Save a small classifier with label names and its own processor. Returns the folder."""
    torch.manual_seed(1)
    config = FocalNetConfig(
        embed_dim=8, depths=[1, 1, 1, 1], image_size=32, id2label=dict(enumerate(LABELS)), initializer_range=0.2
    )
    FocalNetForImageClassification(config).save_pretrained(folder)
    published_processor(config).save_pretrained(folder)
    return folder


def save_photos(folder):
    """Fill a folder with five photographs, one of them in a subfolder, and a text file. Returns the folder."""
    (folder / "below").mkdir(parents=True)
    pictures = [data.chelsea(), data.astronaut(), data.coffee(), data.rocket(), data.chelsea()[::-1]]
    names = ["cat.png", "face.jpg", "coffee.PNG", "rocket.webp", "below/upside down.png"]
    for name, pixels in zip(names, pictures, strict=True):
        Image.fromarray(pixels).resize((90, 60)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def classify(model, *arguments):
    """The JSON document and the exit code of ``focalnet classify ... --json``."""
    result = run("classify", "--model", model, "--json", *arguments)
    return json.loads(result.stdout), result.exit_code


def summary(document):
    return {
        os.path.basename(image["path"]): [prediction["label"] for prediction in image["predictions"]]
        for image in document["images"]
    }


def assert_one_line_error(result, *words):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr

"""Every snippet of docs/patching.md runs as it stands there, with small models in the place of the published ones."""

import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from small_models import SMALL, build, images, one_thread  # noqa: F401
from sources import AuthorsFocalNet, TimmFocalNet
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation
from transformers_testing import registered_auto_classes

import focalnet

PAGE = Path(__file__).parents[2] / "docs" / "patching.md"
SIZES = {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 1], "focal_windows": [3, 5]}


def sections():
    """Title -> its snippets."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        found[title] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return found


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The published checkpoint as a folder of that name, timm and the authors' code as modules of that name."""
    monkeypatch.chdir(tmp_path)
    build(transformers, "FocalNetForImageClassification", SMALL).save_pretrained("microsoft/focalnet-tiny")
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, pretrained: TimmFocalNet(**SIZES)
    authors = types.ModuleType("classification.focalnet")
    authors.focalnet_tiny_srf = lambda pretrained: AuthorsFocalNet(**SIZES)
    package = types.ModuleType("classification")
    package.focalnet = authors
    for module in (timm, authors, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(FocalNetModulation, "forward", FocalNetModulation.forward)  # decorated in a snippet
    yield
    if hasattr(FocalNetModulation, "kernel_layer_name"):
        del FocalNetModulation.kernel_layer_name


@pytest.mark.parametrize("title", sections())
def test_snippets_run(title, stand_ins, capsys):
    snippets = sections()[title]
    assert snippets
    detector = torch.nn.ModuleDict(
        {"backbone": AuthorsFocalNet(**SIZES, detection=True), "head": torch.nn.Linear(2, 2)}
    )
    names = {"images": images(), "detector": detector, "focalnet": focalnet}
    with registered_auto_classes() if "dense" in title else torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, f"{PAGE.name}: {title}", "exec"), names)
    if title == "A model of transformers":
        assert "replaced" in capsys.readouterr().out and "left alone" in str(names["report"])
        assert type(names["model"]) is focalnet.FocalNetForImageClassification
    if "detector" in title:
        assert len(names["report"].replaced) >= 2


def test_snippets_about_checkpoints_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig.from_variant("tiny_lrf"))
    model.save_pretrained("saved")
    focalnet.convert_checkpoint("saved", "focalnet_tiny_lrf.pth", "authors")
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.with_name("checkpoints.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(snippet, "checkpoints.md", "exec"), names)
    assert names["model"].classifier.out_features == 37
    assert torch.equal(names["model"].focalnet.layernorm.weight, model.focalnet.layernorm.weight)


def test_the_table_of_compatibility_names_tests_that_exist():
    table = (PAGE.parent / "compatibility.md").read_text()
    named = set(re.findall(r"test_\w+\.py", table))
    tests = {path.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert named and named <= tests
    assert os.path.basename(PAGE) == "patching.md"

"""The documentation: snippets run as they stand, links lead somewhere, the site builds, and tables name what exists.

Snippets run with small models in the place of the published ones.
"""

import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import called_files
import pytest
import torch
import transformers
from markdown.extensions.toc import slugify
from small_models import SMALL, build, images, one_thread  # noqa: F401
from sources import AuthorsFocalNet, TimmFocalNet
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation
from transformers_testing import registered_auto_classes

import focalnet

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "patching.md"
PAGES = sorted(DOCS.glob("*.md"))
# Whatever people read on the web page of the repository.
READ = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "tests" / "README.md", *sorted((ROOT / ".github").glob("*.md"))]
SIZES = {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 1], "focal_windows": [3, 5]}


def snippets_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def sections():
    """Title -> its snippets."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        found[title] = snippets_of(text)
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


@pytest.mark.parametrize("page", ["index.md", "backends.md", "explain.md"])
def test_snippets_of_other_pages_run(page, stand_ins):
    snippets = snippets_of((DOCS / page).read_text())
    assert snippets
    names = {"images": images()}
    levels = {name: logging.getLogger(name).level for name in ("", "focalnet")}
    try:
        for snippet in snippets:
            exec(compile(snippet, page, "exec"), names)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_snippets_about_checkpoints_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig.from_variant("tiny_lrf"))
    model.save_pretrained("saved")
    focalnet.convert_checkpoint("saved", "focalnet_tiny_lrf.pth", "authors")
    (snippet,) = snippets_of(PAGE.with_name("checkpoints.md").read_text())
    names = {}
    exec(compile(snippet, "checkpoints.md", "exec"), names)
    assert names["model"].classifier.out_features == 37
    assert torch.equal(names["model"].focalnet.layernorm.weight, model.focalnet.layernorm.weight)


def test_the_table_of_compatibility_names_tests_that_exist():
    table = (PAGE.parent / "compatibility.md").read_text()
    named = set(re.findall(r"test_\w+\.py", table))
    tests = {path.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert named and named <= tests


@pytest.mark.parametrize("page", ["architecture.md", "../CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    text = (DOCS / page).read_text()
    named = set(re.findall(r"`((?:focalnet|kernels|csrc|tests|bench|docs)/[\w/.]*)`", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_lists_of_called_files_are_those_of_a_call():
    text = called_files.PAGE.read_text()
    assert called_files.filled(text) == text, "`python tests/helpers/called_files.py` writes them anew"
    inference, training = (int(count) for count in re.findall(r"^(\d+) files:$", text, flags=re.MULTILINE))
    assert inference <= 5 and training <= 10


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}


@pytest.mark.parametrize("page", READ, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    broken = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not re.match(r"https?:", link) and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"[\w/]+\.md", navigation)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, where every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    # Not in the checkout: `python -m` puts the current folder on sys.path, and kernels/ would shadow a package.
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_every_public_name_is_documented_on_the_site(site):
    documented = set(re.findall(r'id="focalnet\.(\w+)"', (site / "api.html").read_text()))
    assert documented == set(focalnet.__all__)


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = [page.read_text() for page in site.glob("*.html")]
    assert len(pages) > len(PAGES)  # there is a 404.html too
    loaded = [tag for page in pages for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*", page)]
    assert loaded and not [tag for tag in loaded if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)]

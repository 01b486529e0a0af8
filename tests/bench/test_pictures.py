"""Every figure of the documentation is drawn by a committed command, and none is a blank picture."""

import importlib.util
import re
import shutil

import numpy as np
import pictures
import plots
import pytest
from command_line import offline_and_undone
from PIL import Image

from focalnet.benchmark import rows
from focalnet.benchmark.environment import ROOT
from focalnet.pictures.measurements import bench_figure
from focalnet.training.curves import plot_curves

SHOWN = sorted(
    {link for page in (ROOT / "docs").glob("*.md") for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
)
DEVICES = sorted({device for kind in ("models", "operators", "kernels", "scaling") for device in rows.devices(kind)})
NEEDS = {pictures.page: ("gradio", "playwright"), pictures.beside_grad_cam: ("pytorch_grad_cam",)}


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


def assert_drawn(path):
    """Enough colours, over most of its area, and not all of one row."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    background = pixels[-1, -1]
    inked = (np.abs(pixels - background) > 8).any(-1)
    assert pixels.shape[1] >= 700
    assert len(np.unique(pixels[inked], axis=0)) > 20
    # Something in every quarter of the height and of the width.
    for axis in (0, 1):
        assert all(part.any() for part in np.array_split(inked, 4, axis))


def test_every_figure_of_the_docs_has_its_command():
    of_plots = {f"plots/{path.name}" for path in plots.PLOTS.glob("*.svg")}
    assert set(SHOWN) == of_plots | {f"pictures/{name}" for name in pictures.DRAWN}


@pytest.mark.parametrize("device", DEVICES)
def test_plots_are_drawn_and_the_committed_ones_are_those(device, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "PLOTS", tmp_path)
    monkeypatch.setattr(plots, "SUFFIX", ".png")
    drawn = plots.all_of(device)
    assert {f"plots/{path.stem}.svg" for path in drawn} <= set(SHOWN)
    for path in drawn:
        assert_drawn(path)


@pytest.mark.parametrize("draw", dict.fromkeys(pictures.DRAWN.values()), ids=lambda draw: draw.__name__)
def test_pictures_are_drawn(draw, tmp_path):
    for package in NEEDS.get(draw, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if draw is pictures.page and not (shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("no browser on the path: apt-get install chromium")
    draw(tmp_path)
    names = [name for name, drawing in pictures.DRAWN.items() if drawing is draw]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        assert_drawn(tmp_path / name)
        assert_drawn(pictures.PICTURES / name)
        with Image.open(tmp_path / name) as new, Image.open(pictures.PICTURES / name) as committed:
            assert new.width == committed.width, "`make pictures` draws it"


def test_curves_and_times_are_drawn(tmp_path):
    history = [{"epoch": epoch, "loss": 2 / epoch, "learning_rate": 0.1 / epoch} for epoch in range(1, 9)]
    history += [{"epoch": epoch, "eval_loss": 2.1 / epoch, "eval_accuracy": 1 - 1 / epoch} for epoch in range(1, 9)]
    plot_curves(history, tmp_path / "curves.png", "run")
    measured = [
        {"runtime": "focalnet", "median_s": 0.1},
        {"runtime": "timm", "median_s": 0.2, "ratio": 2.0, "ratio_to": "focalnet"},
    ]
    stage = {"stage": "7 x 7 x 96", "case": "forward", "median_s": 0.01}
    operators = [stage | {"backend": backend} for backend in ("cpu", "reference")]
    figure = bench_figure("tiny", "some CPU", measured, operators)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"100 ms", "200 ms   × 2.00", "7 × 7 × 96, forward", "10 ms"} <= set(texts)
    figure.savefig(tmp_path / "bench.png")
    for name in ("curves.png", "bench.png"):
        assert_drawn(tmp_path / name)

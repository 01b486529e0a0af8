"""Draws the pictures of docs/explain.md into docs/pictures/.

    python bench/pictures.py [FOLDER]

They show the model of digits that comes with the package. The one of Grad-CAM needs grad-cam, the one of the page
needs gradio, playwright and a Chromium. `bench/report.py` draws the plots of docs/performance.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from focalnet import FocalNetForImageClassification, inspect
from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.torchvision_stub import stubbed_torchvision
from focalnet.cli import app
from focalnet.cli.images import load_processor
from focalnet.pictures import maps, style
from focalnet.pretrained import shipped

PICTURES = ROOT / "docs" / "pictures"
SHOWN = 5  # a five, of the digits' data set
BESIDE = (5, 12, 8)


def explained(folder: Path) -> None:
    """The figure and the animation of `focalnet explain`."""
    with _scan(SHOWN) as scan, contextlib.redirect_stdout(io.StringIO()):
        command = ["explain", scan, "--model", "digits", "--out", folder, "--format", "png", "--animate"]
        app(list(map(str, command)), standalone_mode=False)


def beside_grad_cam(folder: Path) -> None:
    """The norm of the modulator beside Grad-CAM, for the same block."""
    with stubbed_torchvision():
        from pytorch_grad_cam import GradCAM
    model = FocalNetForImageClassification.from_pretrained(shipped("digits")).eval()
    processor = load_processor("digits", model.config)
    block = model.focalnet.encoder.stages[0].layers[-1]
    with style.styled():
        figure = style.new_figure(12, 2.5)
        axes = figure.subplots(1, 3 * len(BESIDE))
        for index, panels in zip(BESIDE, axes.reshape(-1, 3), strict=True):
            scan = Image.fromarray(_pixels(index)).convert("RGB")
            pixels = processor(images=scan, return_tensors="pt")["pixel_values"]
            found = inspect(model, pixels, blocks=[(0, -1)])
            image, norm = maps.seen_image(pixels[0], processor), maps.as_array(found.maps[0].modulator_norm[0])
            with GradCAM(_Logits(model), [block], reshape_transform=lambda x: x.permute(0, 3, 1, 2)) as cam:
                importance = cam(input_tensor=pixels, targets=None)[0]
            answer = model.config.id2label[found.output.logits[0].argmax().item()]
            drawn = (image, maps.overlay(image, norm), maps.overlay(image, importance))
            for panel, picture, title in zip(
                panels, drawn, (f"answer: {answer}", "modulator", "Grad-CAM"), strict=True
            ):
                panel.imshow(picture)
                panel.set_title(title)
                panel.set_axis_off()
        figure.suptitle("stage 1: what the modulator lets through, and what the answer depends on", x=0.01, ha="left")
    style.save(figure, folder / "grad-cam.png")


def page(folder: Path) -> None:
    """The page of `focalnet app`, as a browser shows it."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "focalnet", "app", "--port", "0"]
    with _scan(SHOWN) as scan:
        serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=scan.parent)
        try:
            address = serving.stdout.readline().strip()
            with sync_playwright() as started:
                # Without a sandbox, which does not start for root.
                browser = started.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
                tab = browser.new_page(viewport={"width": 1200, "height": 900})
                tab.set_default_timeout(60_000)
                tab.goto(address)
                tab.set_input_files("#image input[type=file]", scan)
                tab.wait_for_selector(".fn-view")
                tab.locator(".fn-stage label").get_by_text("1", exact=True).click()
                tab.wait_for_selector("figcaption:has-text('stage 1')")
                tab.locator(".fn-level label").get_by_text("gate 1", exact=True).click()
                tab.wait_for_selector("figcaption:has-text('gate 1')")
                tab.locator(".fn-stack").hover()
                tab.screenshot(path=folder / "page.png", full_page=True)
                browser.close()
        finally:
            serving.terminate()
            serving.wait(timeout=60)


DRAWN: dict[str, Callable[[Path], None]] = {
    "five.explained.png": explained,
    "five.explained.gif": explained,
    "grad-cam.png": beside_grad_cam,
    "page.png": page,
}


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def _pixels(index: int) -> np.ndarray:
    return np.round(load_digits().images[index] * (255 / 16)).astype(np.uint8)


@contextlib.contextmanager
def _scan(index: int) -> Iterator[Path]:
    """A file of a digit, for as long as the body runs."""
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(_pixels(index)).save(Path(folder, "five.png"))
        yield Path(folder, "five.png")


def _chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for draw in dict.fromkeys(DRAWN.values()):
        draw(folder.resolve())
    for name in DRAWN:
        print(folder / name)


if __name__ == "__main__":
    main()

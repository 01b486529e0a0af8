"""The page of ``focalnet app`` in a real browser: upload, choose, point, and what a broken file says.

Needs Playwright and a Chromium (Debian's `chromium`): .ci/run installs both.
"""

import re
import shutil

import pytest
from command_line import save_model
from PIL import Image
from served_page import served, uploaded
from skimage import data
from sklearn.datasets import load_digits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio", reason="gradio is not installed: pip install 'focalnet[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
if CHROMIUM is None:
    pytest.skip("no browser on the path: apt-get install chromium", allow_module_level=True)
pytestmark = pytest.mark.slow

MEGABYTE = 2**20
GROWTH = 30 * MEGABYTE
"""Less than ten of the photographs that are uploaded, decoded: 12 MB each."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served(folder, "--model", "digits", "--model", save_model(folder / "small")) as page:
        yield page


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # The sandbox refuses to start for root, which tests in a container run as.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, page):
    """The page, opened anew; what it asks for goes to ``tab.asked``."""
    tab = browser.new_page(viewport={"width": 1200, "height": 1000})
    tab.set_default_timeout(60_000)
    tab.asked = []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(page.address)
    tab.wait_for_selector("#image input[type=file]", state="attached")
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray((load_digits().images[5] * 15.9).astype("uint8")).save(folder / "five.png")
    Image.fromarray(data.chelsea()).save(folder / "cat.jpg")
    for index in range(10):
        Image.fromarray(data.coffee()).resize((2048, 2048)).rotate(25 * index).save(folder / f"large-{index}.jpg")
    (folder / "broken.png").write_text("no image at all")
    return folder


def upload(tab, file):
    remove = tab.get_by_label("Remove Image")
    if remove.count():
        remove.click()
        playwright.expect(tab.locator(".fn-view")).to_have_count(0)
    tab.set_input_files("#image input[type=file]", file)


def views(tab):
    return tab.locator(".fn-view")


def choose(tab, kind, name, model=0):
    tab.locator(f"#model-{model} .fn-{kind} label").get_by_text(name, exact=True).click()


def map_of(tab, model=0):
    return tab.locator(f"#model-{model} .fn-map").get_attribute("src")


def test_an_upload_shows_answers_time_and_a_map_of_both_models(tab, photos):
    upload(tab, photos / "five.png")
    playwright.expect(views(tab)).to_have_count(2)
    playwright.expect(tab.locator("#model-0 .fn-name").first).to_have_text("5")
    status = tab.locator("#model-0 .fn-status").first
    playwright.expect(status).to_have_text(re.compile(r"backend \w+ on cpu, [\d.]+ ms"))
    assert tab.locator("#model-1 .fn-name").count() == 5
    # The name of a label is text, whatever it holds.
    assert "[bold]fox" in tab.locator("#model-1 .fn-answers").inner_text()


def test_stage_block_and_level_change_the_map_and_the_pointer_reads_it(tab, photos):
    upload(tab, photos / "five.png")
    playwright.expect(views(tab)).to_have_count(2)
    seen = [map_of(tab)]
    for kind, name, caption in [
        ("level", "gate 2", "stage 3, block 1, gate 2: 7 × 7; 2 × 2 positions"),
        ("stage", "2", "stage 2, block 2, gate 2: 7 × 7; 4 × 4 positions"),
        ("block", "1", "stage 2, block 1, gate 2: 7 × 7; 4 × 4 positions"),
        ("level", "modulator norm", "stage 2, block 1, modulator norm; 4 × 4 positions"),
    ]:
        choose(tab, kind, name)
        playwright.expect(tab.locator("#model-0 figcaption")).to_have_text(caption)
        seen.append(map_of(tab))
    assert len(set(seen)) == len(seen)
    box = tab.locator("#model-0 .fn-stack").bounding_box()
    tab.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.3 * box["height"])
    read = tab.locator("#model-0 .fn-read")
    playwright.expect(read).to_have_text(
        re.compile(r"row 2, column 4:\s+gate 1 -?[\d.]+,\s+gate 2 .*modulator norm [\d.]+")
    )


def test_opacity_changes_the_map_over_the_image(tab, photos):
    upload(tab, photos / "cat.jpg")
    playwright.expect(views(tab)).to_have_count(2)
    pictures = []
    for opacity in ("0", "0.5", "1"):
        tab.locator("#opacity input[type=number]").fill(opacity)
        tab.locator("#opacity input[type=number]").press("Tab")
        playwright.expect(tab.locator("#model-0 .fn-map")).to_have_css("opacity", opacity)
        pictures.append(tab.locator("#model-0 .fn-stack").screenshot())
    assert len(set(pictures)) == 3


def test_a_broken_file_gives_a_message_and_the_next_image_is_shown(tab, photos):
    upload(tab, photos / "broken.png")
    message = tab.locator("#model-0 .fn-message")
    playwright.expect(message).to_have_text(re.compile("not an image; expected AVIF"))
    assert views(tab).count() == 0
    tab.get_by_label("Remove Image").click()
    playwright.expect(message).to_have_count(0)
    tab.set_input_files("#image input[type=file]", photos / "cat.jpg")
    playwright.expect(views(tab)).to_have_count(2)


def test_ten_uploads_in_a_row_do_not_grow_memory(tab, page, photos):
    # A process has its working memory after some uploads; from then on it stays.
    for index in range(10):
        content = (photos / f"large-{index}.jpg").read_bytes()
        assert page.look_at(uploaded(page, f"warm-{index}.jpg", content))["success"]
    before = page.memory()
    for index in range(10):
        upload(tab, photos / f"large-{index}.jpg")
        playwright.expect(views(tab)).to_have_count(2)
    assert page.memory() - before < GROWTH


def test_the_browser_asks_nobody_else(tab, page, photos):
    upload(tab, photos / "cat.jpg")
    playwright.expect(views(tab)).to_have_count(2)
    elsewhere = [url for url in tab.asked if not url.startswith((page.address, "data:", "blob:"))]
    assert tab.asked and elsewhere == []

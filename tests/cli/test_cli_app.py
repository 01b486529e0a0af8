"""``focalnet app``: what the page takes and refuses, what it reads, writes and reaches, and how it works in a browser.

The browser's tests need Playwright and a Chromium (Debian's `chromium`): .ci/run installs both.
"""

import http.server
import io
import os
import re
import shutil
import struct
import threading
import zlib
from pathlib import Path

import pytest
from command_line import assert_one_line_error, run, save_model
from PIL import Image
from served_page import served, uploaded
from skimage import data
from sklearn.datasets import load_digits

import focalnet
from focalnet.cli import serve
from focalnet.cli.errors import UserError
from focalnet.cli.uploads import MAX_BYTES, read_upload

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'focalnet[app]'")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served(folder, "--model", "digits", "--model", save_model(folder / "small")) as page:
        yield page


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


CAT = png(Image.fromarray(data.chelsea()))


def answers(page, file):
    message = page.look_at(file)
    assert message["success"], message
    return message["output"]["data"]


def test_an_image_gets_answers_a_map_and_the_time(page):
    status, bars, view = answers(page, uploaded(page, "cat.png", CAT))
    assert "backend " in status and status.endswith(" ms")
    assert bars.count("%</span>") == 5
    assert "stage 1, block 1, gate 1: 3 × 3; 8 × 8 positions" in view
    assert view.count("data:image/png;base64,") == 3


def bomb():
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED = {
    "text.png": (b"no image at all", "not an image"),
    "cut.png": (CAT[: len(CAT) // 2], "cannot be read"),
    "bomb.png": (bomb(), "megapixels"),
    "large.png": (png(Image.new("1", (10000, 5001))), "10000 x 5001 pixels"),
    "page.eps": (EPS, "not an image"),
    "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image"),
    "strip.png": (png(Image.new("RGB", (20000, 1))), "20000 x 1"),
    "<img src=x>.png": (b"<b>", "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_or_too_large_a_one_gets_a_message(page, name):
    content, words = REFUSED[name]
    _, message, view = answers(page, uploaded(page, name.replace("<", "").replace(">", ""), content))
    assert 'role="alert"' in message and words in message
    assert view == ""


def test_a_file_over_the_limit_is_refused_while_it_comes_and_when_it_is_there(page, tmp_path):
    status, _ = page.upload("huge.png", bytes(MAX_BYTES + 1))
    assert status == 413
    (tmp_path / "huge.png").write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(UserError, match="20 MB"):
        read_upload(tmp_path / "huge.png")


SECRETS = [
    "/etc/passwd",
    "/proc/self/environ",
    str(Path(focalnet.__file__)),
    "{folder}/audit.log",
    "{folder}/tmp/../audit.log",
]


@pytest.mark.parametrize("path", SECRETS)
def test_no_file_but_uploads_can_be_read(page, path):
    path = path.format(folder=page.folder)
    assert Path(path).exists()
    for spelled in (path, path.replace("/", "%2F"), "." + path, "//" + path):
        status, body = page.get(f"/gradio_api/file={spelled}")
        assert status in (400, 403, 404), body[:100]
    message = page.look_at({"path": path, "meta": {"_type": "gradio.FileData"}})
    assert not message["success"]


def test_an_address_is_not_fetched(page):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/secret.png"
    try:
        for file in ({"path": address}, {"path": "x.png", "url": address}):
            message = page.look_at(file | {"meta": {"_type": "gradio.FileData"}})
            assert not message["success"]
    finally:
        server.shutdown()
    assert asked == []


def test_only_this_machine_by_its_own_name_is_answered(page):
    assert page.address.startswith("http://127.0.0.1:")
    assert page.get("/", {"Host": "evil.example"})[0] == 400
    port = int(page.address.rpartition(":")[2])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(page):
    import urllib.request

    with urllib.request.urlopen(page.address) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy


def test_nothing_is_written_but_in_the_temporary_folder_and_nobody_else_is_reached(page):
    answers(page, uploaded(page, "cat.png", CAT))
    inside = [str(page.folder / "tmp"), "/dev/", "/proc/"]
    written = [path for path in page.noted("write") if not path.isdigit()]
    assert any(path.endswith("cat.png") for path in written)
    assert [path for path in written if not path.startswith(tuple(inside))] == []
    left = [path for place in ("home", "work") for path in (page.folder / place).rglob("*")]
    assert left == []
    assert [to for to in page.noted("connect") if not any(own in to for own in ("127.0.0.1", "localhost"))] == []


def test_the_temporary_folder_goes_with_the_page(monkeypatch):
    folders = []

    def interrupted(*arguments):
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        (folders[0] / "cat.png").write_bytes(CAT)
        raise KeyboardInterrupt

    monkeypatch.setattr("focalnet.cli.serve._serve", interrupted)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert run("app").exit_code != 0
    assert folders and not folders[0].exists()


def test_what_the_command_refuses():
    assert_one_line_error(run("app", "--model", "digits", "--model", "digits", "--model", "digits"), "--model", "two")
    assert_one_line_error(run("app", "--model", "./no/such"), "./no/such")
    assert_one_line_error(run("app", "--backend", "abacus"), "--backend", "abacus")


# ---- in a browser --------------------------------------------------------------------------------------------------

GROWTH = 25 * 2**20
"""Less than ten of the photographs that are uploaded, decoded: 3 MB each."""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no browser on the path: apt-get install chromium")
    playwright.expect.set_options(timeout=60_000)
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
        Image.fromarray(data.coffee()).resize((1024, 1024)).rotate(25 * index).save(folder / f"large-{index}.jpg")
    (folder / "broken.png").write_text("no image at all")
    return folder


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def upload(tab, file):
    remove = tab.get_by_label("Remove Image")
    if remove.count():
        remove.click()
        expect(tab.locator(".fn-view")).to_have_count(0)
    tab.set_input_files("#image input[type=file]", file)


def views(tab):
    return tab.locator(".fn-view")


def choose(tab, kind, name, model=0):
    tab.locator(f"#model-{model} .fn-{kind} label").get_by_text(name, exact=True).click()


def map_of(tab, model=0):
    return tab.locator(f"#model-{model} .fn-map").get_attribute("src")


def test_an_upload_shows_answers_time_and_a_map_of_both_models(tab, photos):
    upload(tab, photos / "five.png")
    expect(views(tab)).to_have_count(2)
    expect(tab.locator("#model-0 .fn-name").first).to_have_text("5")
    status = tab.locator("#model-0 .fn-status").first
    expect(status).to_have_text(re.compile(r"backend \w+ on cpu, [\d.]+ ms"))
    assert tab.locator("#model-1 .fn-name").count() == 5
    # The name of a label is text, whatever it holds.
    assert "[bold]fox" in tab.locator("#model-1 .fn-answers").inner_text()


def test_stage_block_and_level_change_the_map_and_the_pointer_reads_it(tab, photos):
    upload(tab, photos / "five.png")
    expect(views(tab)).to_have_count(2)
    seen = [map_of(tab)]
    for kind, name, caption in [
        ("level", "gate 2", "stage 3, block 1, gate 2: 7 × 7; 2 × 2 positions"),
        ("stage", "2", "stage 2, block 2, gate 2: 7 × 7; 4 × 4 positions"),
        ("block", "1", "stage 2, block 1, gate 2: 7 × 7; 4 × 4 positions"),
        ("level", "modulator norm", "stage 2, block 1, modulator norm; 4 × 4 positions"),
    ]:
        choose(tab, kind, name)
        expect(tab.locator("#model-0 figcaption")).to_have_text(caption)
        seen.append(map_of(tab))
    assert len(set(seen)) == len(seen)
    box = tab.locator("#model-0 .fn-stack").bounding_box()
    tab.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.3 * box["height"])
    read = tab.locator("#model-0 .fn-read")
    expect(read).to_have_text(re.compile(r"row 2, column 4:\s+gate 1 -?[\d.]+,\s+gate 2 .*modulator norm [\d.]+"))


def test_opacity_changes_the_map_over_the_image(tab, photos):
    upload(tab, photos / "cat.jpg")
    expect(views(tab)).to_have_count(2)
    pictures = []
    for opacity in ("0", "0.5", "1"):
        tab.locator("#opacity input[type=number]").fill(opacity)
        tab.locator("#opacity input[type=number]").press("Tab")
        expect(tab.locator("#model-0 .fn-map")).to_have_css("opacity", opacity)
        pictures.append(tab.locator("#model-0 .fn-stack").screenshot())
    assert len(set(pictures)) == 3


def test_a_broken_file_gives_a_message_and_the_next_image_is_shown(tab, photos):
    upload(tab, photos / "broken.png")
    message = tab.locator("#model-0 .fn-message")
    expect(message).to_have_text(re.compile("not an image; expected AVIF"))
    assert views(tab).count() == 0
    tab.get_by_label("Remove Image").click()
    expect(message).to_have_count(0)
    tab.set_input_files("#image input[type=file]", photos / "cat.jpg")
    expect(views(tab)).to_have_count(2)


def test_ten_uploads_in_a_row_do_not_grow_memory(tab, page, photos):
    # A process has its working memory after some uploads; from then on it stays.
    for index in range(10):
        content = (photos / f"large-{index}.jpg").read_bytes()
        assert page.look_at(uploaded(page, f"warm-{index}.jpg", content))["success"]
    growths = []
    # A leak shows in every ten uploads, what the allocator happens to hold in some.
    while len(growths) < 3 and min(growths, default=GROWTH) >= GROWTH:
        before = page.memory()
        for index in range(10):
            upload(tab, photos / f"large-{index}.jpg")
            expect(views(tab)).to_have_count(2)
        growths.append(page.memory() - before)
    assert min(growths) < GROWTH, growths


def test_the_browser_asks_nobody_else(tab, page, photos):
    upload(tab, photos / "cat.jpg")
    expect(views(tab)).to_have_count(2)
    elsewhere = [url for url in tab.asked if not url.startswith((page.address, "data:", "blob:"))]
    assert tab.asked and elsewhere == []


def test_the_page_takes_what_a_file_does_not_tell(tmp_path, monkeypatch):
    run("convert", save_model(tmp_path / "model"), tmp_path / "model.pth", "--format", "authors")
    assert_one_line_error(run("app", "--model", tmp_path / "model.pth"), "use_post_layernorm", "--set")
    shown = []
    monkeypatch.setattr(serve, "_serve", lambda looking, *_: shown.extend(looking))
    told = ["--set", "use_post_layernorm=false", "--set", "image_size=32", "--set", "normalize_modulator=false"]
    assert run("app", "--model", tmp_path / "model.pth", *told).exit_code == 0
    assert [looking.name for looking in shown] == [str(tmp_path / "model.pth")]

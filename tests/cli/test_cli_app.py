"""``focalnet app`` over HTTP: what it takes, what it refuses, and that it reads, writes and reaches nothing else."""

import http.server
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import pytest
from command_line import assert_one_line_error, offline_and_undone, run, save_model
from PIL import Image
from served_page import served, uploaded
from skimage import data

import focalnet
from focalnet.cli.errors import UserError
from focalnet.cli.uploads import MAX_BYTES, read_upload

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'focalnet[app]'")


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


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

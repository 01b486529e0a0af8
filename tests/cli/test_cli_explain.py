"""``focalnet explain``: the figures it writes, and that it treats files as ``focalnet classify`` does."""

import numpy as np
import pytest
from command_line import assert_one_line_error, run, save_photos
from PIL import Image
from skimage import data


@pytest.fixture
def cat(tmp_path):
    Image.fromarray(data.chelsea()).resize((90, 60)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def explain(*arguments, model="digits", out):
    return run("explain", *arguments, "--model", model, "--out", out)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_figure_for_each_image_1200_pixels_wide_as_png_and_svg(cat, tmp_path):
    result = explain(cat, out=tmp_path / "new" / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert names_in(tmp_path / "new" / "out") == ["cat.explained.png", "cat.explained.svg"]
    assert [line.rpartition("/")[2] for line in result.stdout.splitlines()] == [
        "cat.explained.png",
        "cat.explained.svg",
    ]
    with Image.open(tmp_path / "new" / "out" / "cat.explained.png") as figure:
        assert figure.width == 1200
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    assert "<svg" in (tmp_path / "new" / "out" / "cat.explained.svg").read_text()


def test_stage_and_block_choose_the_rows(cat, tmp_path):
    heights = []
    for index, chosen in enumerate([["--stage", 2, "--block", 1], ["--stage", 2], ["--stage", 1, "--stage", 2]]):
        assert explain(cat, *chosen, "--format", "png", out=tmp_path / str(index)).exit_code == 0
        heights.append(Image.open(tmp_path / str(index) / "cat.explained.png").height)
    assert heights[0] == heights[1] < heights[2]
    first, last = (np.asarray(Image.open(tmp_path / name / "cat.explained.png")) for name in "01")
    assert (first != last).any()


def test_the_animation_has_a_frame_for_each_block(cat, tmp_path):
    assert explain(cat, "--animate", "--format", "svg", out=tmp_path / "out").exit_code == 0
    assert names_in(tmp_path / "out") == ["cat.explained.gif", "cat.explained.svg"]
    with Image.open(tmp_path / "out" / "cat.explained.gif") as animation:
        assert (animation.n_frames, animation.width) == (4, 1200)
        frames = [np.asarray((animation.seek(index), animation.convert("RGB"))[1]) for index in range(4)]
    assert all((frame != frames[0]).any() for frame in frames[1:])


def test_files_of_one_name_and_with_odd_names_each_get_their_figure(model_folder, tmp_path):
    for name in ("a/[red] $x$.png", "b/[red] $x$.png", "猫.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / name)
    images = [tmp_path / "a" / "[red] $x$.png", tmp_path / "b", tmp_path / "猫.png"]
    result = explain(*images, "--format", "png", "--stage", 1, model=model_folder, out=tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    written = [path.name for path in tmp_path.glob("*.explained.png")]
    assert sorted(written) == ["[red] $x$-2.explained.png", "[red] $x$.explained.png", "猫.explained.png"]


def test_broken_and_missing_files_are_reported_and_skipped(model_folder, tmp_path):
    photos = save_photos(tmp_path / "photos")
    (photos / "cut.jpg").write_bytes((photos / "face.jpg").read_bytes()[:500])
    (photos / "text.png").write_text("no image at all")
    Image.new("RGB", (20000, 1)).save(photos / "strip.png")
    arguments = [photos / name for name in ("cut.jpg", "text.png", "strip.png", "gone.png", "face.jpg")]
    result = explain(*arguments, "--format", "png", "--stage", 1, model=model_folder, out=tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.count("skipped: ") == result.stderr.count("\n") == 4
    assert names_in(tmp_path / "out") == ["face.explained.png"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stage", 4], ["--stage", "1 to 3", "got 4"]),
        (["--stage", 1, "--block", 2], ["--block", "1 to 1", "got 2"]),
        (["--block", 0], ["--block", "got 0"]),
        (["--backend", "abacus"], ["--backend", "abacus"]),
    ],
)
def test_what_is_not_there_is_one_clear_line(cat, tmp_path, arguments, words):
    assert_one_line_error(explain(cat, *arguments, out=tmp_path / "out"), *words)


def test_a_folder_that_cannot_be_made_and_no_image_are_one_clear_line(cat, tmp_path):
    assert_one_line_error(explain(cat, out=cat / "out"), "--out", "expected a folder")
    result = explain(tmp_path / "*.jpg", out=tmp_path)
    assert result.exit_code == 2
    assert "no image found" in result.stderr.splitlines()[-1]

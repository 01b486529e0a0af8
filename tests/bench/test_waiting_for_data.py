"""bench/waiting_for_data.py: photographs as JPEGs; the share is that of the time inside the loader."""

import time

import pytest
import waiting_for_data
from PIL import Image
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, PLAIN

from focalnet.training.models import Start
from focalnet.training.views import TrainingViews


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    waiting_for_data.write_photographs(folder, 16)
    return folder


def test_photographs_are_jpegs_of_imagenets_size_in_two_classes(photographs):
    files = sorted((photographs / "train").rglob("*.jpg"))
    assert [path.parent.name for path in files] == ["first"] * 8 + ["second"] * 8
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
    assert len({path.read_bytes() for path in files}) == len(files)


def test_waiting_is_the_time_inside_the_loader(photographs, tmp_path, monkeypatch):
    """Each image takes 20 ms longer; nothing prepares them beside the training."""
    plain = TrainingViews.__getitem__
    monkeypatch.setattr(TrainingViews, "__getitem__", lambda self, index: time.sleep(0.02) or plain(self, index))
    settings = PLAIN.but(epochs=1, batch_size=4)
    row = waiting_for_data.waiting(photographs, tmp_path / "run", settings, Start(config=CONFIG))
    assert row["steps"] == 4
    assert 16 * 0.02 < row["waited_s"] < row["total_s"]
    assert row["share"] == row["waited_s"] / row["total_s"]
    assert row["images_per_s"] == 16 / row["total_s"]


def test_shares_are_those_of_the_calls_up_to_the_last_step():
    clock = waiting_for_data.Clock(asked=[10.0, 20.0, 30.0], came=[12.0, 20.5, 30.5], ended=40.0)
    row = clock.row()
    assert (row["waited_s"], row["total_s"], row["share"]) == (3.0, 30.0, 0.1)
    assert row["share_after_first"] == pytest.approx(1 / 28)
    assert row["longest_wait_s"] == 2.0


def test_the_loader_alone_delivers_whole_batches(photographs):
    assert 0 < waiting_for_data.alone(photographs, PLAIN.but(batch_size=4)) < 1e5

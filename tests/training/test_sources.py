"""From the name of data to what is trained on and what is held out."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from small_runs import class_folders, reader

from focalnet.training.sources import every_fifth, load_source


def names(table):
    return [cell["path"].rsplit("/", 2)[-2:] for cell in table["image"]]


def test_every_fifth_of_each_class_is_held_out_and_a_small_class_keeps_its_first():
    labels = [0, 1] * 6 + [2, 2, 3]
    held = every_fifth(labels)
    assert held == [8, 9, 13]
    assert all(labels[place] == label for place, label in zip(held, [0, 1, 2], strict=True))


def test_digits_are_split_as_every_run_splits_them():
    source = load_source("digits", reader(), labelled=True)
    assert (len(source.train), len(source.held_out)) == (1442, 355)
    assert np.bincount(source.held_out["label"]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert source.labels == [str(digit) for digit in range(10)]


def test_photographs_have_no_labels():
    source = load_source("photographs", reader(), labelled=False)
    assert source.labels is None and len(source.held_out) == pytest.approx(len(source.train) / 4, rel=0.01)
    with pytest.raises(ValueError, match="expected a label for each image"):
        load_source("photographs", reader(), labelled=True)


def test_folders_named_train_and_val_are_taken_so(tmp_path):
    class_folders(tmp_path / "train", images=4)
    class_folders(tmp_path / "val", images=2)
    source = load_source(str(tmp_path), reader(), labelled=True)
    assert (len(source.train), len(source.held_out), source.labels) == (8, 4, ["blue", "red"])


def test_class_that_only_val_has_is_refused(tmp_path):
    class_folders(tmp_path / "train", images=4)
    class_folders(tmp_path / "val", ("blue", "green"), images=2)
    with pytest.raises(ValueError, match="green are not among those to train on"):
        load_source(str(tmp_path), reader(), labelled=True)


def test_order_does_not_depend_on_the_file_system(tmp_path):
    source = load_source(str(class_folders(tmp_path / "data", images=6)), reader(), labelled=True)
    assert names(source.held_out) == [["blue", "04.png"], ["red", "04.png"]]
    assert names(source.train)[:5] == [["blue", f"{index:02d}.png"] for index in (0, 1, 2, 3, 5)]


@pytest.mark.parametrize("labels", ["numbers", "words", "classes"])
def test_parquet_holds_images_and_any_kind_of_label(labels, tmp_path):
    folder = load_source(str(class_folders(tmp_path / "data")), reader(), labelled=True)
    cells = [{"bytes": Path(cell["path"]).read_bytes(), "path": None} for cell in folder.train["image"]]
    values = folder.train["label"][:]
    kind = {
        "numbers": datasets.Value("int64"),
        "words": datasets.Value("string"),
        "classes": datasets.ClassLabel(names=folder.labels),
    }[labels]
    if labels == "words":
        values = [folder.labels[value] for value in values]
    table = datasets.Dataset.from_dict(
        {"image": cells, "label": values}, features=datasets.Features({"image": datasets.Image(), "label": kind})
    )
    table.to_parquet(tmp_path / "data.parquet")
    source = load_source(str(tmp_path / "data.parquet"), reader(), labelled=True)
    assert source.labels == (["0", "1"] if labels == "numbers" else ["blue", "red"])
    assert (len(source.train), len(source.held_out)) == (26, 6)
    assert source.train[0]["image"]["bytes"] is not None


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)], ids=["train and test", "train alone"])
def test_name_on_the_hub_gives_its_splits_and_columns(splits, tmp_path, monkeypatch):
    source = load_source(str(class_folders(tmp_path / "data")), reader(), labelled=True)
    columns = {"image": "img", "label": "fine_label"}
    tables = {split: source.train.rename_columns(columns) for split in splits}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(tables) if name == "a/b" else None)
    found = load_source("a/b", reader(), labelled=True)
    assert found.labels == ["blue", "red"]
    assert found.train.column_names == ["image", "label"]
    assert (len(found.train), len(found.held_out)) == ((32, 32) if len(splits) == 2 else (26, 6))


def test_parquet_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="no column of images; the columns are text, label"):
        load_source(str(tmp_path / "data.parquet"), reader(), labelled=True)


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a folder of images or a \.parquet file, got a \.csv file"):
        load_source(str(tmp_path / "data.csv"), reader(), labelled=True)

"""What no run can start with: one line that says what came and what to do, before any training and any file."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from command_line import assert_one_line_error, offline_and_undone, run
from PIL import Image
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, PLAIN, class_folders, small_run, train

from focalnet import FocalNetConfig, FocalNetForImageClassification
from focalnet.training import preconditions, runs, sharding
from focalnet.training.models import Start
from focalnet.training.preconditions import bytes_on_disk
from focalnet.training.saving import why_no_space


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def data(squares, tmp_path):
    return shutil.copytree(squares, tmp_path / "data")


SMALL = [f"--set={name}={value}" for name, value in CONFIG.items()]
SMALL += ["--recipe=digits", "--image-size=16", "--batch-size=8", "--epochs=1"]


def finetune(data, *arguments):
    output = data.parent / "out"
    result = run("finetune", data, "--output", output, *SMALL, *arguments)
    assert not output.exists() or result.exit_code < 2
    return result


def test_empty_folder(tmp_path):
    (tmp_path / "data").mkdir()
    assert_one_line_error(finetune(tmp_path / "data"), "data", "no image in its class folders")


def test_folder_of_images_without_classes(data):
    flat = data.parent / "flat"
    shutil.copytree(data / "blue", flat)
    assert_one_line_error(finetune(flat), "no image in its class folders")


def test_one_class(data):
    shutil.rmtree(data / "red")
    assert_one_line_error(finetune(data), "at least two classes", "got one: blue")


def test_no_such_data(tmp_path):
    assert_one_line_error(finetune(tmp_path / "nowhere"), "no such file or folder", "digits")


def test_corrupt_images_are_skipped_and_counted(data):
    (data / "blue" / "00.png").write_bytes(b"not an image")
    whole = (data / "red" / "03.png").read_bytes()
    (data / "red" / "03.png").write_bytes(whole[: len(whole) // 2])
    result = finetune(data)
    assert result.exit_code == 1
    assert result.stderr.count("skipped:") == 2 and "00.png" in result.stderr and "03.png" in result.stderr
    assert "training on 30 images" in result.stdout


def test_corrupt_images_are_refused_with_strict(data):
    (data / "blue" / "00.png").write_bytes(b"not an image")
    assert_one_line_error(finetune(data, "--strict"), "1 of 40 images cannot be read", "00.png")


def test_class_whose_images_are_all_corrupt(data):
    for path in (data / "blue").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="no image to train on of 1 of its classes: blue"):
        train(data, data.parent / "out")


def test_labels_that_the_head_does_not_know(data, tmp_path):
    config = FocalNetConfig(**CONFIG, image_size=16, id2label={0: "red", 1: "green"})
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "model")
    result = run(
        "finetune",
        data,
        "--output",
        tmp_path / "out",
        "--recipe=digits",
        f"--model={tmp_path / 'model'}",
        "--keep-head",
    )
    assert_one_line_error(result, "does not know 1 of the 2 labels", "'blue'", "without --keep-head")


def test_checkpoint_of_other_channels(data, tmp_path):
    config = FocalNetConfig(**CONFIG, image_size=16, num_channels=1)
    FocalNetForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="num_channels 3, this one has 1"):
        train(data, tmp_path / "out", start=Start(str(tmp_path / "model")))


def test_model_that_is_not_there(data):
    result = run("finetune", data, "--output", data.parent / "out", "--model", "nobody/nothing")
    assert_one_line_error(result, "nobody/nothing", "check the spelling")


def test_no_space_on_disk(data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert_one_line_error(finetune(data), "checkpoints will take", "GB are free", "free some space")


def test_what_is_asked_of_the_disk_is_what_a_run_writes(data, tmp_path):
    train(data, tmp_path / "out", PLAIN.but(ema=0.9, epochs=3))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    parameters = train(data, tmp_path / "again", PLAIN)["parameters"]
    assert written <= bytes_on_disk(parameters, averaged=True)
    assert why_no_space(tmp_path / "not" / "there" / "yet", 1) is None


def test_cuda_out_of_memory_says_which_setting_to_change(data, tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs.FocalNetTrainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"--batch-size 4 --accumulate 2.*--gradient-checkpointing.*--bf16"):
        train(data, tmp_path / "out")


def test_batch_larger_than_the_data(data):
    assert_one_line_error(finetune(data, "--batch-size", 64), "at most the 32 images", "--batch-size 32")


def test_output_that_is_taken(data):
    (data.parent / "out").mkdir()
    (data.parent / "out" / "notes.txt").write_text("mine")
    result = run("finetune", data, "--output", data.parent / "out", *SMALL)
    assert_one_line_error(result, "there is something already", "--resume")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("mixup=-1", ["mixup", "at least 0", "-1"]),
        ("nothing=1", ["nothing: no such setting", "layer_decay"]),
        ("crop_scale=[1, 0.5]", ["crop_scale", "smaller one first"]),
        ("mixup", ["--option", "NAME=VALUE"]),
    ],
)
def test_settings_out_of_range(option, words, data):
    assert_one_line_error(finetune(data, f"--option={option}"), *words)


def test_recipe_that_is_not_there_or_for_another_task(data):
    out = data.parent / "out"
    assert_one_line_error(run("finetune", data, "-o", out, "--recipe", "huge"), "huge", "tiny_lrf_224")
    assert_one_line_error(run("finetune", data, "-o", out, "--recipe", "photographs"), "focalnet pretrain")


def test_masks_that_do_not_fit_the_models_grid(data):
    arguments = ["-o", data.parent / "out", "--recipe", "photographs", "--image-size", 40]
    result = run("pretrain", data, *arguments, "--option", "mask_patch_size=6")
    assert_one_line_error(result, "mask_patch_size", "multiple of the stem's stride 4, got 6")
    dropping = run("pretrain", data, *arguments, "--set", "drop_incomplete_patches=true")
    assert_one_line_error(dropping, "multiple of the network's stride 16", "drop_incomplete_patches", "40")
    assert not (data.parent / "out").exists()


def test_fsdp_in_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP: expected several processes, got one"):
        train(data, tmp_path / "out")


def test_first_version_of_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match=r"expected fsdp_version 2 .* got 1; .*fsdp2\.yaml"):
        sharding.set_up(SimpleNamespace(num_processes=2, device=torch.device("cpu"), state=state))


def test_resuming_from_a_folder_that_other_machines_do_not_see(data, tmp_path, monkeypatch):
    train(data, tmp_path / "out", PLAIN.but(epochs=1))
    monkeypatch.setattr(preconditions.processes, "gathered", lambda value: [value, []] if value else [value])
    with pytest.raises(ValueError, match="a folder that all machines see; process 0 finds checkpoint-4"):
        train(data, tmp_path / "out", PLAIN.but(epochs=1), resume=True)


def test_missing_packages_are_named(data, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else found(name))
    assert_one_line_error(finetune(data), "kornia", "pip install 'focalnet[train]'")


def test_small_run_is_one(data):
    """The helper's run does train: what is refused above is refused for its own reason."""
    assert small_run(data, "unused").settings == PLAIN
    assert Image.open(next((data / "red").iterdir())).size == (16, 16)
    assert finetune(data).exit_code == 0

"""The command line but for classify: info, convert, --debug, --version, and the command as a process."""

import json
import re
import subprocess
import sys

import pytest
import torch
from command_line import assert_one_line_error, classify, run, save_photos, summary
from safetensors.torch import load_file

import focalnet
from focalnet.cli.info import automatic_line


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos")


def test_debug_shows_the_exception(photos):
    result = run("--debug", "classify", photos, "--model", "./no/such/model.pth")
    assert "expected a file" in str(result.exception)


def test_info_names_every_backend_with_a_reason():
    result = run("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["backends"] == focalnet.backends()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["focalnet"] == focalnet.__version__
    assert facts["extension"]["loaded"] == (facts["extension"]["reason"] is None)
    assert facts["backends"][facts["automatic"]["cpu"]] is None
    assert facts["extension"]["loaded"] == facts["machine"]["L2 cache"].endswith(" KB a core")


def test_info_is_readable():
    result = run("info")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in [*focalnet.backends(), "transformers", "threads", "gpu"])
    assert "Chosen automatically on cpu: " in result.stdout


def test_info_says_for_which_dtype_a_backend_is_chosen_on_a_gpu():
    line = automatic_line("cuda", {"float32": "triton", "bfloat16": "cuda", "float16": "triton"})
    assert "triton in float32, cuda in bfloat16, triton in float16" in line and "gpu_order.py" in line


@pytest.mark.parametrize("name, suffix", [("authors", ".pth"), ("timm", ".safetensors")])
def test_convert_there_and_back_gives_the_same_bits_with_the_options_it_prints(
    model_folder, tmp_path, caplog, name, suffix
):
    there, back = tmp_path / f"converted{suffix}", tmp_path / "back"
    result = run("convert", model_folder, there, "--format", name)
    assert result.exit_code == 0, result.stderr
    assert "in the format transformers" in result.stdout
    assert f"{there}: {name}" in result.stdout
    assert not caplog.records, "said twice"
    options = re.search(r"read it with (.*)", result.stdout)[1].split()
    result = run("convert", there, back, *options)
    assert result.exit_code == 0, result.stderr
    assert f"in the format {name}" in result.stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_convert_refuses_to_overwrite_unless_forced(model_folder, tmp_path):
    there = tmp_path / "model.safetensors"
    there.write_text("precious")
    assert_one_line_error(run("convert", model_folder, there, "--format", "timm"), "--force")
    assert there.read_text() == "precious"
    assert run("convert", model_folder, there, "--format", "timm", "--force").exit_code == 0
    assert load_file(there)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no/such/file.pth", "{out}"], ["no/such/file.pth", "expected a file"]),
        (["{model}", "{out}", "--set", "depths"], ["FIELD=VALUE"]),
        (["{model}", "{out}", "--set", "dephts=[1]"], ["dephts"]),
        (["{model}", "{out}", "--variant", "enormous"], ["enormous", "tiny_lrf"]),
    ],
)
def test_convert_explains_what_it_cannot_do(model_folder, tmp_path, arguments, words):
    places = {"model": model_folder, "out": tmp_path / "out"}
    assert_one_line_error(run("convert", *[argument.format(**places) for argument in arguments]), *words)


def test_command_works_as_a_process_without_torchvision(model_folder, photos):
    blocked = (
        "import runpy, sys; sys.modules['torchvision'] = None; runpy.run_module('focalnet.cli', run_name='__main__')"
    )
    (photos / "broken.png").write_text("no image")
    process = subprocess.run(
        [sys.executable, "-c", blocked, "classify", str(photos), "--model", str(model_folder), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines() == [f"skipped: {photos / 'broken.png'}: not an image that Pillow can read"]
    assert summary(json.loads(process.stdout)) == summary(classify(model_folder, photos)[0])


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"focalnet {focalnet.__version__}\n")

"""Which backend comes first on a GPU: what was measured and asked for, else the table. What is asked for stays.

No GPU is needed: the device is a name, and both backends say that they can run.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch

from focalnet.backends import gpu_order, registry, tuned
from focalnet.backends.problem import Problem

GPU = torch.device("cuda", 0)
KERNELS = ((3, 3), (5, 5), (7, 7))
HERE = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "focalnet": "0.1", "torch": "2.11", "triton": "3.6"}


def problem(side=56, batch=128, operator="focal_modulation", dtype=torch.bfloat16):
    return Problem(operator, GPU, dtype, batch, side, side, 96, KERNELS)


@pytest.fixture(autouse=True)
def _h100(monkeypatch):
    """A device of capability 9.0 on which both backends run every call."""
    monkeypatch.delenv("FOCALNET_TUNED", raising=False)
    monkeypatch.setattr(gpu_order, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_order, "FIRST", {("H100", "bfloat16", "focal_modulation"): "TTC T.C CCT CTC"})
    monkeypatch.setattr(tuned, "facts", lambda device: HERE)
    for name in ("triton", "cuda"):
        able = replace(registry._REGISTRY[name], missing=lambda: None, accepts=lambda problem: None)
        monkeypatch.setitem(registry._REGISTRY, name, able)
    for cached in (gpu_order._predicted, tuned._choices):
        cached.cache_clear()
    yield
    for cached in (gpu_order._predicted, tuned._choices):
        cached.cache_clear()


@pytest.mark.parametrize(
    "side, batch, expected",
    [
        (7, 4, "triton"), (7, 33, "cuda"), (8, 128, "cuda"), (9, 32, "triton"), (32, 4, "cuda"), (32, 33, "triton"),
        (33, 1, "cuda"), (800, 5, "triton"), (800, 128, "cuda"),
    ],
)  # fmt: skip
def test_the_table_decides_by_side_and_batch(side, batch, expected):
    assert registry.automatic(problem(side, batch)) == expected


def test_the_other_backend_comes_next_and_the_reference_last():
    assert gpu_order.order(problem(56, 128)) == ("cuda", "triton", "reference")
    assert gpu_order.order(problem(56, 8)) == ("triton", "cuda", "reference")


def test_the_first_backend_that_can_run_the_call_takes_it(monkeypatch):
    unable = replace(registry._REGISTRY["cuda"], accepts=lambda problem: "it does not take this call")
    monkeypatch.setitem(registry._REGISTRY, "cuda", unable)
    assert registry.automatic(problem(56, 128)) == "triton"


@pytest.mark.parametrize("other", [{"dtype": torch.float16}, {"operator": "gated_aggregation"}])
def test_what_the_table_does_not_name_takes_the_default_order(other):
    assert gpu_order.order(problem(**other)) == gpu_order.DEFAULT


@pytest.mark.parametrize(
    "capability, name",
    [
        ((7, 5), None), ((8, 0), "A100"), ((8, 6), "RTX 4090"), ((8, 9), "RTX 4090"), ((9, 0), "H100"),
        ((10, 3), "B200"), ((12, 0), "RTX 4090"), (None, None),
    ],
)  # fmt: skip
def test_a_device_goes_by_the_predictions_of_its_kind(capability, name):
    assert gpu_order.device_class(capability) == name


def test_what_is_asked_for_by_name_does_not_depend_on_the_table():
    ctx, weights = torch.empty(128, 56, 56, 96, dtype=torch.bfloat16, device="meta"), [torch.empty(96, 1, 3, 3)]
    for name in ("triton", "cuda"):
        run = registry.choose("focal_modulation", ctx, weights, name)
        assert run is registry._REGISTRY[name].operators["focal_modulation"]


# ---- what focalnet tune measured ------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A file in which Triton was faster where the table says cuda."""
    path = tmp_path / "tuned.json"
    choice = tuned.Choice("triton", {"block_w": 16, "block_c": 32}, {"triton": 1e-4, "cuda": 2e-4})
    tuned.keep(path, HERE, {tuned.key(problem(56, 128)): choice})
    return path


def test_measurements_count_only_if_they_are_asked_for(measured, monkeypatch):
    monkeypatch.setenv("FOCALNET_CACHE_DIR", str(measured.parent))
    assert registry.automatic(problem(56, 128)) == "cuda"
    for value in ("1", str(measured)):
        monkeypatch.setenv("FOCALNET_TUNED", value)
        assert registry.automatic(problem(56, 128)) == "triton"
    monkeypatch.setenv("FOCALNET_TUNED", "0")
    assert registry.automatic(problem(56, 128)) == "cuda"


def test_a_call_that_was_not_measured_goes_by_the_table(measured, monkeypatch):
    monkeypatch.setenv("FOCALNET_TUNED", str(measured))
    assert registry.automatic(problem(56, 64)) == "cuda"
    assert tuned.choice(problem(28, 128)) is None


@pytest.mark.parametrize("fact", HERE)
def test_another_gpu_driver_or_version_is_passed_over_with_the_reason(fact, measured, monkeypatch, caplog):
    monkeypatch.setenv("FOCALNET_TUNED", str(measured))
    monkeypatch.setattr(tuned, "facts", lambda device: HERE | {fact: "another"})
    with caplog.at_level(logging.DEBUG, "focalnet"):
        assert registry.automatic(problem(56, 128)) == "cuda"
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert f"{fact} was {HERE[fact]}, is another" in record.message


BROKEN = {
    "no JSON": "{",
    "another format": json.dumps({"format": 0, "gpus": []}),
    "no facts": json.dumps({"format": 1, "gpus": [{"calls": {}}]}),
    "an unknown backend": json.dumps(
        {"format": 1, "gpus": [{"facts": HERE, "calls": {"a": {"backend": "x", "plan": None, "seconds": {}}}}]}
    ),
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_reported_once_and_not_used(content, tmp_path, monkeypatch, caplog):
    path = tmp_path / "tuned.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("FOCALNET_TUNED", str(path))
    with caplog.at_level(logging.WARNING, "focalnet"):
        assert [registry.automatic(problem(56, 128)) for _ in range(2)] == ["cuda", "cuda"]
    (record,) = caplog.records
    assert str(path) in record.message and "focalnet tune" in record.message


def test_a_missing_file_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FOCALNET_TUNED", str(tmp_path / "none.json"))
    assert registry.automatic(problem(56, 128)) == "cuda"
    assert "does not exist" in caplog.records[0].message


def test_a_file_keeps_other_gpus_and_drops_what_another_version_measured(measured):
    choice = tuned.Choice("cuda", None, {"cuda": 1e-4})
    tuned.keep(measured, HERE, {"another call": choice})
    tuned.keep(measured, HERE | {"gpu": "NVIDIA A100"}, {"a call": choice})
    assert [len(gpu["calls"]) for gpu in tuned.read(measured)] == [2, 1]
    tuned.keep(measured, HERE | {"driver": "590.2"}, {"a call": choice})
    found = {gpu["facts"]["gpu"]: (gpu["facts"]["driver"], len(gpu["calls"])) for gpu in tuned.read(measured)}
    assert found == {"NVIDIA A100": ("580.1", 1), HERE["gpu"]: ("590.2", 1)}


def test_the_folder_is_the_platforms_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FOCALNET_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.default_file() == tmp_path / "focalnet" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.default_file() == tmp_path / ".cache" / "focalnet" / "tuned.json"


def test_the_drivers_version_is_read_from_the_kernel_module(tmp_path):
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert tuned._driver(str(path)) == "550.54.15"

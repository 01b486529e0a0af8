"""``focalnet tune``: what it measures, keeps and refuses, with made-up times and a CPU that stands for a GPU."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from command_line import assert_one_line_error, run

from focalnet.backends import registry, triton_plans, tuned
from focalnet.benchmark import tuning
from focalnet.benchmark.runtimes import Case

HERE = {"gpu": "A GPU", "driver": "580.1", "focalnet": "0.1", "torch": "2.11", "triton": "3.6"}
CASE = Case("tiny_lrf", 32, 2)
MICROSECONDS = {"triton": 100e-6, "cuda": 50e-6, "table": 90e-6, "plan 1": 30e-6, "plan 2": 95e-6}


def fake_timer(calls):
    return {name: MICROSECONDS[name] for name in calls}


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    """The reference stands for both GPU backends; three plans of Triton, of which the last does not run."""
    reference = registry._REGISTRY["reference"]
    for name in ("triton", "cuda"):
        monkeypatch.setitem(registry._REGISTRY, name, replace(reference, name=name))

    def candidates(operator, operands, mask):
        def refused():
            raise RuntimeError("out of shared memory\nand more")

        for number, call in enumerate((int, int, refused)):
            yield replace_config(number), call

    monkeypatch.setattr(triton_plans, "candidates", candidates)


def replace_config(number):
    from focalnet.kernels.launch_table import LevelConfig

    return LevelConfig(16, 32, rows=4 + number)


def test_every_stage_is_measured_forward_and_backward_on_both_backends():
    found = list(tuning.tune(CASE, ["triton", "cuda"], fake_timer, with_plans=False))
    assert [(one.operator, one.stage.name) for one in found] == [
        (operator, stage)
        for stage in ("8 x 8 x 96", "4 x 4 x 192", "2 x 2 x 384", "1 x 1 x 768")
        for operator in tuning.OPERATORS
    ]
    assert all(one.seconds == {"triton": 100e-6, "cuda": 50e-6} and one.choice.backend == "cuda" for one in found)


def test_a_faster_plan_counts_for_triton_and_one_that_does_not_run_is_named():
    found = next(iter(tuning.tune(CASE, ["triton", "cuda"], fake_timer)))
    assert found.choice == tuned.Choice("triton", asdict(replace_config(1)), {"triton": 30e-6, "cuda": 50e-6})
    assert found.failed == {"plan 2": "RuntimeError: out of shared memory"}


def test_the_plan_of_the_table_is_not_kept_as_one():
    slower = MICROSECONDS | {"plan 1": 91e-6}
    found = next(iter(tuning.tune(CASE, ["triton"], lambda calls: {name: slower[name] for name in calls})))
    assert found.choice == tuned.Choice("triton", None, {"triton": 100e-6})


def test_a_backend_that_fails_is_left_out(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no kernel image")

    broken = replace(registry._REGISTRY["cuda"], operators=dict.fromkeys(tuning.OPERATORS, fails))
    monkeypatch.setitem(registry._REGISTRY, "cuda", broken)
    found = next(iter(tuning.tune(CASE, ["triton", "cuda"], fake_timer, with_plans=False)))
    assert found.seconds.keys() == {"triton"}
    assert found.failed == {"cuda": "RuntimeError: no kernel image"}


@pytest.fixture
def gpu(monkeypatch):
    """The command believes in a GPU; operands stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned, "facts", lambda device: HERE)
    monkeypatch.setattr(tuning, "timer", lambda device, rounds: fake_timer)
    stages, operands = tuning.stages, tuning.operands
    monkeypatch.setattr(tuning, "stages", lambda case: stages(case)[:1])
    monkeypatch.setattr(tuning, "operands", lambda stage, case: operands(stage, replace(case, device="cpu")))


def tune(*arguments):
    return run("tune", "--size", 32, "--dtype", "float32", *arguments)


def test_the_result_is_kept_and_the_registry_goes_by_it(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALNET_CACHE_DIR", str(tmp_path))
    result = tune("--batch-size", 2, "--batch-size", 4, "--no-plans")
    assert result.exit_code == 0, result.stderr
    assert "FOCALNET_TUNED=1" in result.stdout and str(tmp_path / "tuned.json") in result.stdout
    (entry,) = json.loads((tmp_path / "tuned.json").read_text())["gpus"]
    assert entry["facts"] == HERE
    assert entry["calls"].keys() == {
        f"{operator} float32 {batch}x8x8x96 3x3 5x5 7x7" for batch in (2, 4) for operator in tuning.OPERATORS
    }
    problem = next(iter(tuning.tune(CASE, [], fake_timer))).problem._replace(device=torch.device("cuda", 0))
    monkeypatch.setenv("FOCALNET_TUNED", "1")
    tuned._choices.cache_clear()
    assert registry.automatic(problem) == "cuda"
    monkeypatch.delenv("FOCALNET_TUNED")
    monkeypatch.setattr(registry.gpu_order, "_capability", lambda device: None)
    assert registry.automatic(problem) == "triton"


def test_a_plan_is_shown_by_what_sets_it_apart_and_a_named_file_is_written(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = tune("--out", tmp_path / "mine.json")
    assert result.exit_code == 0, result.stderr
    assert "rows 5" in result.stdout
    assert "plan 2 failed: RuntimeError: out of shared memory" in result.stdout
    assert f"FOCALNET_TUNED={tmp_path / 'mine.json'}" in result.stdout
    assert len(tuned.read(tmp_path / "mine.json")[0]["calls"]) == 2


def test_what_was_measured_stays_if_the_rest_fails(gpu, tmp_path, monkeypatch):
    measured = iter([fake_timer, fake_timer])

    def timer(calls):
        return next(measured)(calls)

    monkeypatch.setattr(tuning, "timer", lambda device, rounds: timer)
    result = tune("--out", tmp_path / "tuned.json", "--no-plans", "--batch-size", 1, "--batch-size", 2)
    assert result.exit_code != 0
    assert len(tuned.read(tmp_path / "tuned.json")[0]["calls"]) == 2


def test_without_a_gpu_the_command_says_so_and_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FOCALNET_CACHE_DIR", str(tmp_path))
    result = run("tune")
    assert_one_line_error(result, "nothing to tune without a GPU", "no CUDA device")
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())


def test_an_unknown_variant_is_one_clear_line():
    assert_one_line_error(run("tune", "--variant", "enormous"), "--variant", "tiny_lrf", "enormous")


def test_a_tuned_plan_is_the_one_that_triton_runs(monkeypatch):
    from focalnet.kernels.plan import Case as Call

    case = Call.packed(2, 8, 8, 32, (3, 5), torch.float32)
    ctx = SimpleNamespace(device=torch.device("cuda", 0))
    found = {"plan": asdict(replace_config(2))}
    monkeypatch.setattr(tuned, "choice", lambda problem: tuned.Choice("triton", found["plan"], {}))
    assert triton_plans._tuned("focal_modulation", {"ctx": ctx}, case) == replace_config(2)
    found["plan"] = {"a field that is gone": 1}
    assert triton_plans._tuned("focal_modulation", {"ctx": ctx}, case) is None

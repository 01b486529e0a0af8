"""``focalnet bench``: what it measures, and what it refuses."""

import json
import re

import pytest
from command_line import assert_one_line_error, run

from focalnet.benchmark import operators
from focalnet.benchmark.runtimes import INFERENCE_ON_A_CPU, RUNTIMES, Case, able


@pytest.fixture(scope="module")
def plot(tmp_path_factory):
    return tmp_path_factory.mktemp("plot") / "times.svg"


@pytest.fixture(scope="module")
def document(plot):
    """The smallest run: one process for ours, one for the reference."""
    runtimes = ["--runtime", "focalnet", "--runtime", "focalnet, reference"]
    result = run("bench", "--json", "--size", 32, "--rounds", 2, *runtimes, "--plot", plot)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_runtime_asked_for_has_a_row_with_times_and_memory(document):
    assert [row["runtime"] for row in document["models"]] == ["focalnet", "focalnet, reference"]
    for row in document["models"]:
        assert row["runs"] >= row["rounds"] >= 2
        assert row["ratio_to"] == "focalnet"
        assert 0 < row["fastest_s"] <= row["median_s"]
        # The weights of FocalNet-T are 114 MB.
        assert row["peak_memory_bytes"] > row["model_memory_bytes"] > 1e8
    assert document["absent"] == {}


def test_the_operator_is_measured_at_every_stage_forward_and_backward_by_every_backend(document):
    measured = {(row["stage"], row["case"], row["backend"]) for row in document["operators"]}
    stages = ["8 x 8 x 96", "4 x 4 x 192", "2 x 2 x 384", "1 x 1 x 768"]
    backends = operators.able_backends("cpu")
    assert measured == {(s, d, b) for s in stages for d in operators.DIRECTIONS for b in backends}


def test_the_times_are_drawn(document, plot):
    bars = len(document["models"]) + len(document["operators"])
    assert len(re.findall(r"<path[^>]* clip-path=", plot.read_text())) == bars


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    assert_one_line_error(run("bench", "--plot", tmp_path / "times.bmp"), "--plot", ".svg", "times.bmp")
    assert_one_line_error(run("bench", "--plot", tmp_path / "no" / "times.svg"), "--plot", "folder that exists")


def test_the_machine_is_described(document):
    assert {"device", "threads", "commit", "focalnet", "torch"} <= document["environment"].keys()


def test_unknown_variant_and_runtime_are_one_clear_line():
    assert_one_line_error(run("bench", "--variant", "enormous"), "--variant", "tiny_lrf", "enormous")
    assert_one_line_error(run("bench", "--runtime", "abacus"), "--runtime", "openvino", "abacus")


def test_runtime_that_cannot_run_the_case_is_refused():
    result = run("bench", "--dtype", "bfloat16", "--device", "cpu", "--runtime", "openvino")
    assert_one_line_error(result, "--runtime", "openvino", "bfloat16")


@pytest.mark.parametrize("case", [Case("tiny_lrf", 224, 1, training=True), Case("tiny_lrf", 224, 1, device="cuda")])
def test_runtimes_of_inference_on_a_cpu_are_asked_for_nothing_else(case):
    assert set(RUNTIMES) - set(able(case)) == set(INFERENCE_ON_A_CPU)


def test_openvinos_default_precision_is_compared_with_models_of_bfloat16_and_its_float32_is_not():
    unable = set(RUNTIMES) - set(able(Case("tiny_lrf", 224, 1, dtype="bfloat16")))
    assert unable == set(INFERENCE_ON_A_CPU) - {"openvino, default"}

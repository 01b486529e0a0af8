"""The README's figures are those of the committed rows; plots are drawn from them."""

import json
import os
import subprocess
import sys

import gpu_summary
import pytest
import report
import rows
import torch
import typer


def test_every_table_of_the_readme_is_what_the_committed_rows_say():
    text = report.README.read_text()
    assert text.count("<!-- report: ") == text.count("<!-- end -->") > 0
    assert report.filled(text) == text, "`make report` writes the tables anew"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")

    def row(runtime, batch, seconds):
        return {
            "case": "inference", "variant": "tiny_lrf", "size": 224, "batch": batch, "dtype": "float32",
            "runtime": runtime, "median_s": seconds, "fastest_s": seconds / 2, "flops": seconds * 5e10,
            "peak_memory_bytes": 5e8, "fma_peak": 1e11,
        }  # fmt: skip

    rows.write([row("focalnet", 1, 0.1), row("timm", 1, 0.25), row("focalnet", 8, 0.5)], "models", report.CPU)
    scaling = [{"case": "scaling", "series": "batch", "subject": "tiny_lrf", "x": x, "median_s": x} for x in (1, 2, 4)]
    rows.write(scaling, "scaling", report.CPU)
    return tmp_path


def test_tables_have_times_ratios_and_gaps(measured):
    assert report.headline().splitlines()[2:] == [
        "| focalnet | 100 / 50 | 1.00 | 500 | 500 / 250 | 1.00 | 500 |",
        "| timm | 250 / 125 | 2.50 | 500 |  |  |  |",
    ]
    assert report.ratios().splitlines()[2:] == [
        "| tiny_lrf | 224 | 1 | 100 | 50% | 2.50 |",
        "| tiny_lrf | 224 | 8 | 500 | 50% |  |",
    ]
    assert report.growth().splitlines()[2:] == ["| batch | tiny_lrf | 1 to 4 | 1.00 |"]
    assert report.training() == "Not measured yet."


def test_marked_parts_are_replaced_and_the_rest_is_kept(measured):
    text = "before\n<!-- report: training -->\nold\nlines\n<!-- end -->\nafter\n"
    expected = "before\n<!-- report: training -->\nNot measured yet.\n<!-- end -->\nafter\n"
    assert report.filled(text) == expected
    assert report.filled(expected) == expected


def test_plots_are_the_same_bytes_for_the_same_rows(measured):
    paths = [report.speedup_plot(), *report.scaling_plots()]
    first = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["cpu-inference.svg", "scaling-batch.svg"]
    assert all(b"</svg>" in content for content in first)
    report.speedup_plot()
    report.scaling_plots()
    assert [path.read_bytes() for path in paths] == first


def test_summary_of_a_gpu_run_has_every_part_and_row_and_fails_with_them(measured, tmp_path):
    (tmp_path / "parts.tsv").write_text("build\t0\t80\ntests-cuda\t1\t30\nmodels\t124\t120\n")
    with pytest.raises(typer.Exit):
        gpu_summary.main(tmp_path / "parts.tsv", device="cpu")
    (path,) = tmp_path.glob("results/*.json")
    document = json.loads(path.read_text())
    assert [(part["part"], part["status"]) for part in document["parts"]] == [
        ("build", "passed"),
        ("tests-cuda", "failed (1)"),
        ("models", "out of time"),
    ]
    assert document["rows"]["kernels"] == []
    assert {"device", "torch", "commit"} <= document["environment"].keys()


def test_gpu_script_says_where_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = report.ROOT / "bench" / "gpu.sh"
    ended = subprocess.run(
        ["bash", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert "no CUDA device" in ended.stderr
    assert subprocess.run(["bash", "-n", script]).returncode == 0

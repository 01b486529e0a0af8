"""The README's figures are those of the committed rows; plots are drawn from them."""

import pytest
import report
import rows


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
            "runtime": runtime, "median_s": seconds, "fastest_s": seconds / 2, "share_of_fma_peak": 0.5,
            "peak_memory_bytes": 5e8,
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

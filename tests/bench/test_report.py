"""The figures of docs/performance.md are those of the committed rows; plots are drawn from them."""

import re

import gpu_tables
import learning_curves
import plots
import pytest
import report

from focalnet.benchmark import rows

DEVICE = "Some CPU, family 1 model 2, avx2, 2 cores"


def test_every_table_of_the_page_is_what_the_committed_rows_say():
    text = report.PAGE.read_text()
    assert text.count("<!-- report: ") == text.count("<!-- end -->") > 0
    assert report.filled(text) == text, "`make report` writes the tables anew"


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_every_plot_of_a_page_is_there(page):
    path = report.ROOT / page
    shown = re.findall(r"\]\(([^)]*plots/[^)]+)\)", path.read_text())
    assert shown
    assert [plot for plot in shown if not (path.parent / plot).is_file()] == [], "`make report` draws them"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Rows of every kind, of a device that is not there."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    machine = {"device": DEVICE, "fma_peak": 1e11, "bandwidth": 2e10, "dtype": "float32", "variant": "tiny_lrf"}

    def row(runtime, batch, seconds, **more):
        return machine | {
            "case": "inference", "size": 224, "batch": batch, "runtime": runtime, "median_s": seconds,
            "fastest_s": seconds / 2, "flops": seconds * 5e10, "peak_memory_bytes": 5e8, **more,
        }  # fmt: skip

    def compared(runtime, batch, seconds, ratio, **more):
        return row(runtime, batch, seconds, ratio_to="focalnet", ratio=ratio, **more)

    # The last has a ratio of rounds, 2.4, which is not that of the medians.
    models = [row("focalnet", 1, 0.1), row("timm", 1, 0.25), row("focalnet", 8, 0.5), compared("timm", 8, 1.0, 2.4)]
    rows.write(models, "models", DEVICE)
    of_networks = [compared("focalnet", 1, 0.1, 1.0), compared("Swin-T", 1, 0.12, 1.25)]
    rows.write([one | {"parameters": 28.2e6} for one in of_networks], "architectures", DEVICE)
    scaling = [
        row(
            runtime, x, x * seconds, case="scaling", series="batch", subject="tiny_lrf", x=x, peak_memory_bytes=x * 1e9
        )
        for runtime, seconds in (("focalnet", 1), ("transformers", 2))
        for x in (1, 2, 4)
    ]
    levels = {"case": "scaling", "series": "levels", "subject": "focal_modulation", "runtime": "focalnet"}
    scaling += [machine | levels | {"x": x, "median_s": x**0.5} for x in (1, 2, 3, 4)]
    rows.write(scaling, "scaling", DEVICE)
    work = {"least_bytes": 1e8, "fma": 1e9, "matrix": 1e9, "floor_s": 0.02, "ratio_to": "cpu"}
    stage = machine | {"operator": "focal_modulation", "stage": "7 x 7 x 96", "case": "forward", "batch": 8, **work}
    of_operator = [stage | {"backend": "cpu", "median_s": 0.05, "ratio": 1}]
    of_operator.append(stage | {"backend": "reference", "median_s": 0.2, "ratio": 4.1})
    rows.write(of_operator, "operators", DEVICE)
    learned = machine | {"case": "learning", "batch": 64, "images": 1442, "parameters": 134881, "flops": 5060544}
    of_seeds = [
        learned | {"series": series, "runtime": runtime, "seed": seed, "every": 1, "accuracy": [0.5, 0.96, last]}
        for runtime, series, lasts in (
            ("focalnet", learning_curves.ALL, (0.97, 0.99)),
            ("ViT", learning_curves.ALL, (0.9, 0.94)),
            ("focalnet", learning_curves.FEW, (0.7, 0.8)),
            ("focalnet", learning_curves.PRETRAINED, (0.8, 0.9)),
        )
        for seed, last in enumerate(lasts)
    ]
    of_step = machine | {"case": "training step", "runtime": "focalnet", "batch": 64, "median_s": 0.05}
    rows.write([*of_seeds, of_step], "learning", DEVICE)
    waited = {"case": "first epoch", "batch": 16, "workers": 2, "steps": 12, "waited_s": 0.5, "total_s": 50.0}
    waited |= {"share": 0.01, "share_after_first": 0.001, "images_per_s": 3.84, "images_per_s_alone": 120.4}
    rows.write([machine | waited], "waiting_for_data", DEVICE)
    return tmp_path


def test_tables_have_times_ratios_and_gaps(measured):
    assert report.headline(DEVICE).splitlines()[2:] == [
        "| focalnet | 100 / 50 | 1.00 | 500 | 500 / 250 | 1.00 | 500 |",
        "| timm | 250 / 125 | 2.50 | 500 | 1000 / 500 | 2.40 | 500 |",
    ]
    assert report.ratios(DEVICE).splitlines()[2:4] == [
        "| tiny_lrf | 224 | 1 | 100 | 50% | 2.50 |",
        "| tiny_lrf | 224 | 8 | 500 | 50% | 2.40 |",
    ]
    assert report.architectures(DEVICE).splitlines() == [
        "| network | M parameters | GFLOP | batch 1, ms | time over focalnet's | memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| FocalNet-T LRF, focalnet | 28.2 | 5.0 | 100 / 50 | 1.00 | 500 |",
        "| Swin-T, transformers | 28.2 | 6.0 | 120 / 60 | 1.25 | 500 |",
    ]
    assert report.operators(DEVICE).splitlines()[:3] == [
        "| H x W x C |  | floor, ms | cpu, ms | reference, ms | reference over cpu |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 7 x 7 x 96 | forward | 20.0 | 50.0 | 200.0 | 4.10 |",
    ]
    assert report.learning(DEVICE).splitlines()[2:4] == [
        "| FocalNet, focalnet | 135 | 5.06 | 2 | 50.0 | 98.0 (97.0 to 99.0) | 2 | 2 |",
        "| ViT, transformers | 135 | 5.06 | 2 |  | 92.0 (90.0 to 94.0) | 2 |  |",
    ]
    assert report.pretraining(DEVICE).splitlines()[2] == (
        "| FocalNet, focalnet | 2 | 75.0 (70.0 to 80.0) | 85.0 (80.0 to 90.0) | +10.0 |"
    )
    assert report.waiting_for_data(DEVICE).splitlines()[2] == (
        "| 16 | 2 | 12 | 0.50 | 50.0 | 1.0% | 0.1% | 3.8 | 120 |"
    )
    assert report.growth(DEVICE).splitlines()[2:5] == [
        "| batch | tiny_lrf | focalnet | 1 to 4 | 1.00 | 1000 to 4000 |",
        "| batch | tiny_lrf | transformers | 1 to 4 | 1.00 | 1000 to 4000 |",
        "| levels | focal_modulation | focalnet | 1 to 4 | 0.50 |  |",
    ]


def test_the_models_memory_has_a_column_as_soon_as_a_row_has_it(measured):
    row = next(row for row in rows.read("models", DEVICE) if row["runtime"] == "focalnet" and row["batch"] == 1)
    rows.write([row | {"model_memory_bytes": 1.29e8}], "models", DEVICE)
    head, _, ours, theirs = report.headline(DEVICE).splitlines()
    assert head.count("| memory, MB | of it the model's, MB |") == 2
    assert ours == "| focalnet | 100 / 50 | 1.00 | 500 | 129 | 500 / 250 | 1.00 | 500 |  |"
    assert theirs == "| timm | 250 / 125 | 2.50 | 500 |  | 1000 / 500 | 2.40 | 500 |  |"


def test_rows_of_a_gpu_have_tables_of_their_own(measured):
    of_gpu = [
        {
            "device": "Some GPU", "driver": "1.2", "case": "inference", "variant": "tiny_lrf", "size": 224,
            "batch": 128, "dtype": "bfloat16", "runtime": runtime, "median_s": ms / 1e3, "fastest_s": ms / 1e3,
            "peak_memory_bytes": 1e9, "ratio_to": "focalnet", "ratio": ms / 20,
        }
        for runtime, ms in (("focalnet", 20), ("transformers", 50))
    ]  # fmt: skip
    rows.write(of_gpu, "models", "Some GPU")
    title, _, *table = report.gpu().splitlines()
    assert title == "Some GPU, tiny_lrf, 224 x 224, bfloat16, inference:"
    assert table[-1].startswith("![Bars") and plots.speedup("Some GPU").name in table[-1]
    assert table[2:-2] == ["| focalnet | 20 / 20 | 1.00 | 1000 |", "| transformers | 50 / 50 | 2.50 | 1000 |"]
    assert "Some GPU" not in report.headline(DEVICE)


def test_operators_and_kernels_of_a_gpu_stand_beside_the_compiled_reference_and_the_prediction(measured):
    call = {
        "device": "Some GPU", "driver": "1.2", "operator": "gated_aggregation", "variant": "tiny_lrf", "stage": 1,
        "batch": 128, "dtype": "bfloat16",
    }  # fmt: skip
    of_gpu = [call | {"case": "kernel", "runtime": "reference, torch.compile", "median_s": 5e-4}]
    for backend, microseconds in (("cuda", 200.0), ("triton", 300.0)):
        launches = call | {"case": "launches", "backend": backend, "operator": "focal_modulation"}
        of_gpu.append(launches | {"operator": "gated_aggregation", "subject": "all", "measured_us": microseconds})
        of_gpu.append(launches | {"subject": "some_kernel", "measured_us": microseconds, "predicted_us": 80.0})
        of_gpu.append(launches | {"subject": "short_kernel", "measured_us": 2.0, "predicted_us": 1.0})
    of_gpu.append({"device": "Some GPU", "driver": "1.2", "case": "device", "subject": "copy", "median_s": 1e-3})
    rows.write(of_gpu, "kernels", "Some GPU")
    title, _, _, _, line, _ = gpu_tables.operators().splitlines()
    assert title.startswith("Some GPU, tiny_lrf, batch 128, bfloat16")
    assert line == "| 1 | gated_aggregation |  | 200 | 300 | 500 |  | 2.5 |"
    *_, cuda, triton = gpu_tables.kernels().splitlines()
    assert cuda == "| 1 | focal_modulation | cuda | `some_kernel` | 200 | 80 | 2.50 |"
    assert triton == "| 1 | focal_modulation | triton | `some_kernel` | 300 | 80 | 3.75 |"
    assert plots.roofline("Some GPU") is None


def test_every_processor_has_a_table_under_its_name(measured):
    other = DEVICE.replace("model 2", "model 3")
    twice = [row | {"device": other, "median_s": 2 * row["median_s"]} for row in rows.read("models", DEVICE)]
    rows.write(twice, "models", other)
    first, second = report.PARTS["headline"]().split(f"\n\n{other}:\n\n")
    assert first == f"{DEVICE}:\n\n{report.headline(DEVICE)}"
    assert second.splitlines()[2] == "| focalnet | 200 / 50 | 1.00 | 500 | 1000 / 250 | 1.00 | 500 |"


def test_what_has_no_rows_says_so_and_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    of_gpus = ("gpu", "gpu-operators", "gpu-kernels")
    expected = dict.fromkeys(report.PARTS, "Not measured yet.") | dict.fromkeys(of_gpus, "Not measured on a GPU yet.")
    expected["predicted"] = expected["predicted-gpus"] = "Nothing is predicted yet."
    assert {name: part() for name, part in report.PARTS.items()} == expected
    assert plots.all_of(DEVICE) == []
    assert not plots.PLOTS.exists()


def test_marked_parts_are_replaced_and_the_rest_is_kept(measured):
    text = "before\n<!-- report: training -->\nold\nlines\n<!-- end -->\nafter\n"
    expected = "before\n<!-- report: training -->\nNot measured yet.\n<!-- end -->\nafter\n"
    assert report.filled(text) == expected
    assert report.filled(expected) == expected


def test_plots_are_the_same_bytes_for_the_same_rows_and_the_tables_show_them(measured):
    paths = plots.all_of(DEVICE)
    first = {path.name: path.read_bytes() for path in paths}
    assert all(b"</svg>" in content for content in first.values())
    shown = set(re.findall(r"plots/(\S+)\)", "".join(part() for part in report.PARTS.values())))
    expected = {"inference", "roofline", "growth-batch", "growth-levels", "learning", "pre-training"}
    assert first.keys() == shown == {f"{name}-some-cpu-family-1-model-2-avx2-2-cores.svg" for name in expected}
    assert {path.name: path.read_bytes() for path in plots.all_of(DEVICE)} == first


def test_the_roof_is_the_data_sheets_on_a_gpu_and_as_measured_on_a_processor():
    cpu = [{"fma_peak": 1e11, "bandwidth": 1e10}, {"fma_peak": 9e10, "bandwidth": 2e10}]
    assert plots._peaks(DEVICE, cpu) == (2e10, {"FMA": 1e11})
    bandwidth, rates = plots._peaks("NVIDIA H200", [{}])
    assert (bandwidth, rates["FMA"]) == (4.8e12, 66.9e12)
    assert plots._peaks("Some GPU", [{"median_s": 1}]) is None

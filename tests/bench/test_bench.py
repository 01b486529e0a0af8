"""The parts of bench/ that can be wrong without anybody noticing: rows, timing, ratios, fits, peers."""

import io
import itertools
import json
import shutil
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import compare
import models
import operators
import pytest
import report
import scaling
import torch
import typer

from focalnet.benchmark import architectures, environment, processor, rows, runtimes, timing, turns, worker
from focalnet.benchmark import peaks as peaks_module
from focalnet.benchmark.peaks import Peaks
from focalnet.benchmark.runtimes import RUNTIMES, Case

CASE = Case("tiny_lrf", 224, 1)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path


def test_a_new_row_replaces_that_of_its_case_and_no_other(results):
    first = [{"case": "inference", "batch": batch, "runtime": "ours", "median_s": 1.0} for batch in (1, 8)]
    rows.write(first, "models", "Some CPU (R) 3")
    rows.write([{**first[0], "median_s": 0.5}], "models", "Some CPU (R) 3")
    rows.write([{**first[0], "runtime": "theirs", "median_s": 2.0}], "models", "Some CPU (R) 3")
    read = rows.read("models", "Some CPU (R) 3")
    assert sorted((row["runtime"], row["batch"], row["median_s"]) for row in read) == [
        ("ours", 1, 0.5),
        ("ours", 8, 1.0),
        ("theirs", 1, 2.0),
    ]
    assert (results / "some-cpu-r-3" / "models.json").exists()


def test_no_row_of_another_kind_or_device_is_read(results):
    rows.write([{"case": "inference"}], "models", "one")
    assert rows.read("models", "another") == []
    assert rows.read("training", "one") == []


def test_a_table_keeps_numbers_as_numbers_and_digests_as_text(tmp_path, monkeypatch):
    """A digest may look like a number; a cell that is empty is no field."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    written = [
        {"x": "RTX 4090", "batch": 128, "predicted_us": 0.25, "digest": "0123456789012345", "triton": "3.6"},
        {"x": "H100", "batch": 1, "subject": "1 a_kernel<float16, 4>", "digest": "12e4567890123456"},
    ]
    path = rows.write_table(written, "predicted", "one", ("x", "batch", "subject", "predicted_us", "digest", "triton"))
    assert rows.read("predicted", "one") == written
    assert len(path.read_text().splitlines()) == 3


CPUINFO = {
    "Zen 3": "processor : 0\ncpu family : 25\nmodel : 1\nmodel name : AMD EPYC\nflags : fpu avx2\n\nprocessor : 1",
    "Zen 4": "cpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nflags : avx2 avx512f avx512_vnni avx512_bf16",
    "ARM": "processor : 0\nFeatures : fp asimd sve bf16\nCPU implementer : 0x41\nCPU part : 0xd40",
}
DEVICES = {
    "Zen 3": "AMD EPYC, family 25 model 1, avx2, 2 cores",
    "Zen 4": "AMD EPYC, family 25 model 17, avx512_bf16, 2 cores",
    "ARM": ", family 0x41 model 0xd40, bf16, 2 cores",
}


@pytest.mark.parametrize("name", CPUINFO)
def test_processors_of_one_name_have_rows_of_their_own(name, results, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO[name])
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for limit in processor.LIMITS:
        monkeypatch.delenv(limit, raising=False)
    facts = environment.facts()
    assert facts["device"].endswith(DEVICES[name])
    assert facts["processor"]["instruction_sets"] == [s for s in CPUINFO[name].split() if s in WIDENING]
    rows.write([{"case": "inference", **facts}], "models", facts["device"])
    assert rows.processors("models") == [facts["device"]]
    monkeypatch.setenv("FOCALNET_CPU_ISA", "plain")
    assert environment.device() == facts["device"] + ", FOCALNET_CPU_ISA=plain"
    assert rows.read("models", environment.device()) == []


WIDENING = {name for group in processor.INSTRUCTION_SETS for name in group}


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
def test_exponent_of_a_power_law_is_its_power(power):
    assert scaling.exponent([(x, 3 * x**power) for x in (2, 5, 11, 40)]) == pytest.approx(power)


def test_fit_looks_at_the_larger_half_where_fixed_costs_weigh_least():
    points = [{"x": x, "median_s": 100.0 if x < 8 else float(x * x)} for x in (1, 2, 4, 8, 16, 32)]
    assert scaling.fitted(points) == pytest.approx(2)


def test_times_are_those_of_one_call_and_rounds_alternate():
    order = []

    def sleeping(name, seconds):
        def call(number):
            order.append(name)
            time.sleep(seconds)

        return call

    timings = timing.measure({"a": sleeping("a", 0.03), "b": sleeping("b", 0.06)}, rounds=3)
    assert timings["a"].row()["fastest_s"] == pytest.approx(0.03, rel=0.3)
    assert timings["b"].row()["fastest_s"] == pytest.approx(0.06, rel=0.3)
    assert timings["a"].row()["runs"] == 3
    turns = [name for name, before in zip(order, ["", *order], strict=False) if name != before]
    assert turns[-6:] == ["a", "b", "a", "b", "a", "b"]


def test_every_call_gets_another_number():
    seen = []
    timing.measure({"": lambda number: (seen.append(number), time.sleep(0.004))}, rounds=1)
    block = seen[-5:]
    assert block == list(range(block[0], block[0] + 5))


@pytest.mark.parametrize("size, copies", [(1 << 40, 2), (1, timing.MAX_COPIES)])
def test_inputs_rotate_past_the_cache(size, copies):
    assert timing.copies_past_cache(size) == copies


# ---- runtimes taking turns ------------------------------------------------------------------------------------------


def test_a_ratio_is_that_of_times_in_the_same_round_so_drift_leaves_it_alone():
    drift = [1.0, 1.1, 1.5, 2.0, 1.2]
    found = timing.ratio([2 * d for d in drift], drift)
    assert found == {"ratio": 2, "ratio_quartiles": [2, 2], "ratio_error": 0}


def test_the_error_of_a_ratio_is_that_of_a_median():
    generator = torch.Generator().manual_seed(0)
    rounds, repeats = 25, 2000
    theirs = 2 + 0.1 * torch.randn(repeats, rounds, generator=generator, dtype=torch.float64)
    found = [timing.ratio(times, [1.0] * rounds) for times in theirs.tolist()]
    spread = torch.tensor([one["ratio"] for one in found]).std().item() / 2
    stated = torch.tensor([one["ratio_error"] for one in found]).mean().item()
    assert stated == pytest.approx(spread, rel=0.1)


def test_every_round_has_everybody_once_and_nobody_always_follows_the_same():
    names = ["a", "b", "c", "d"]
    rounds = [turns.order(names, number) for number in range(20)]
    assert rounds == [turns.order(names, number) for number in range(20)]
    assert all(sorted(one) == names for one in rounds)
    followed = {pair for one in rounds for pair in itertools.pairwise(one)}
    assert followed == set(itertools.permutations(names, 2))


class StandIn(turns.Runtime):
    """A runtime without a process: its runs take the seconds that the test lists, over and over."""

    SECONDS: dict = {}  # noqa: RUF012

    def __init__(self, name, case):
        self.name, self.runs, self.turns, self._runs_a_turn = name, [], [], 1
        self.absent = None if name in self.SECONDS else "not here"
        self._next = itertools.cycle(self.SECONDS.get(name, ()))

    def run(self):
        return next(self._next)

    def end(self):
        self.peak_bytes, self.model_bytes = 100, 10


@pytest.fixture
def taking(monkeypatch):
    """Runtimes that take these seconds."""
    monkeypatch.setattr(turns, "Runtime", StandIn)
    return lambda **seconds: monkeypatch.setattr(StandIn, "SECONDS", seconds)


def test_steady_ratios_need_no_more_rounds_than_asked_for(taking):
    taking(focalnet=[1.0, 2.0, 3.0], timm=[2.0, 4.0, 6.0])
    steps = []
    found, absent = turns.compare(CASE, ["timm", "openvino", "focalnet"], 6, lambda: steps.append(1))
    assert [(row["runtime"], row["ratio_to"], row["ratio"], row["rounds"]) for row in found] == [
        ("timm", "focalnet", 2.0, 6),
        ("focalnet", "focalnet", 1.0, 6),
    ]
    assert absent == {"openvino": "not here"}
    assert len(steps) == turns.steps(["timm", "openvino", "focalnet"], 6)
    # The median of the times is far from the fastest; the ratio is not touched by that.
    (line,) = turns.warnings(found)
    assert "median time is far from the fastest run: timm, focalnet" in line


def test_rounds_are_added_up_to_a_limit_while_a_ratio_is_unsteady_and_that_is_said(taking):
    taking(focalnet=[1.0], timm=[1.5, 2.5, 2.0, 3.0, 1.8])
    steps = []
    found, _ = turns.compare(CASE, ["focalnet", "timm"], 6, lambda: steps.append(1))
    assert [row["rounds"] for row in found] == [9, 9]
    assert len(steps) == turns.steps(["focalnet", "timm"], 6)
    first, _ = turns.warnings(found)
    assert "these ratios may differ next time: timm 2.00 (standard error" in first
    assert "focalnet" not in first


def test_a_turn_has_as_many_runs_as_fit_and_its_time_is_their_median(taking):
    taking(focalnet=[0.1, 0.2, 0.1])
    runtime = StandIn("focalnet", CASE)
    runtime.warm_up()
    runtime.turn()
    assert (runtime.runs, runtime.turns) == ([0.2, 0.1], [pytest.approx(0.15)])


def test_what_is_not_there_is_not_compared(taking):
    taking()
    assert turns.compare(CASE, ["focalnet"], 2) == ([], {"focalnet": "not here"})


def answers(monkeypatch, name, asked=""):
    """What the worker of a runtime says."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["worker", name, json.dumps(asdict(Case("tiny_lrf", 32, 1)))])
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    worker.main(out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_worker_times_each_run_it_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setitem(RUNTIMES, "counting", lambda case: lambda images: calls.append(images.shape))
    ready, *seconds, peak = answers(monkeypatch, "counting", "run\nrun\nend\n")
    assert (ready[0], [what for what, _ in seconds], peak[0]) == ("ready", ["seconds", "seconds"], "peak")
    assert calls == [(1, 3, 32, 32)] * (worker.WARM_UP_RUNS + 2)
    of_process, of_model = peak[1]
    assert of_process > 1e8 and 0 <= of_model < of_process


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError(name="abacus"), "abacus is not installed"),
        (RuntimeError("no C++ compiler\nat all"), "RuntimeError: no C++ compiler"),
    ],
)
@pytest.mark.parametrize("when", ["starting", "running"])
def test_a_worker_that_cannot_says_why(error, reason, when, monkeypatch):
    def fail(images):
        raise error

    monkeypatch.setitem(RUNTIMES, "failing", fail if when == "starting" else lambda case: fail)
    assert answers(monkeypatch, "failing") == [["absent", reason]]


# ---- two runs against each other ------------------------------------------------------------------------------------


def ratios(*values, base="focalnet", **more):
    return [
        {"case": "inference", "variant": "tiny_lrf", "size": 224, "batch": batch, "runtime": "timm"}
        | {"ratio": value, "ratio_to": base, **more}
        for batch, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    "before, after, agree",
    [
        (ratios(2.0, 3.0), ratios(2.1, 2.8), True),
        (ratios(2.0, 3.0), ratios(2.1, 2.7), False),
        (ratios(2.7), ratios(3.0), False),
        (ratios(2.0), ratios(2.0, base="transformers"), False),
        (ratios(2.0), ratios(2.0, runtime="openvino"), False),
        ([{"runtime": "timm", "median_s": 1.0}], ratios(2.0), False),
    ],
)
def test_two_runs_agree_when_no_ratio_differs_by_more_than_ten_percent(before, after, agree, capsys):
    assert compare.agree(before, after) is agree
    said = capsys.readouterr().out
    assert "largest difference" in said or "no ratio is in both" in said


def test_a_base_compared_with_itself_is_no_ratio():
    assert compare.pairs(ratios(1.0, runtime="focalnet"), ratios(1.0, runtime="focalnet")) == []


def test_models_compares_with_an_earlier_run_before_it_writes_over_it(results, taking, monkeypatch):
    earlier = rows.write([models_row("timm", 2.0)], "models", "cpu")
    monkeypatch.setattr(models, "facts", lambda device: {"device": "cpu", "threads": 1})
    monkeypatch.setattr(models, "flops_per_image", lambda case: 1)
    monkeypatch.setattr(
        models, "Peaks", lambda: type("", (), {"measure": lambda self, dtype: {"fma_peak": 1, "bandwidth": 1}})()
    )
    taking(focalnet=[1.0], timm=[2.5])
    run = {"variant": ["tiny_lrf"], "size": [224], "batch": [1], "runtime": ["focalnet", "timm"], "rounds": 2}
    run |= {"train": False, "device": "cpu", "dtype": "float32", "standard": False}
    with pytest.raises(typer.Exit):
        models.main(**run, compare_with=earlier)
    assert {row["runtime"]: row["ratio"] for row in rows.read("models", "cpu")} == {"focalnet": 1.0, "timm": 2.5}
    models.main(**run, compare_with=earlier)


def models_row(runtime, ratio):
    case = {"case": "inference", "variant": "tiny_lrf", "size": 224, "batch": 1, "dtype": "float32"}
    return case | {"runtime": runtime, "ratio": ratio, "ratio_to": "focalnet"}


# ---- cases, peers and peaks -----------------------------------------------------------------------------------------


def test_the_standard_cases_have_the_sizes_the_batches_and_the_models_that_are_promised():
    variants, sizes, batches, _, names = zip(*models.STANDARD, strict=True)
    assert {1, 8, 32} <= set(batches) and {224, 384, 640} <= set(sizes)
    assert {variant.split("_")[0] for variant in variants} == {"tiny", "base", "large"}
    assert {runtime for of_case in names for runtime in of_case} <= set(RUNTIMES)
    at_640 = next(of_case for _, size, _, _, of_case in models.STANDARD if size == 640)
    assert {"transformers", "transformers, compile", "onnxruntime", "openvino"} <= set(at_640)


def test_max_autotune_is_measured_only_where_it_is_named():
    slow = {name for name in RUNTIMES if name.endswith(("max-autotune", "int8"))}
    assert {f"{library}, max-autotune" for library in ("focalnet", "transformers", "timm")} <= slow
    assert set(RUNTIMES) - set(runtimes.unasked(CASE)) == slow
    assert slow <= set(runtimes.able(CASE))


def test_every_runtime_has_a_name_in_the_tables():
    assert set(RUNTIMES) <= set(report.NAMES)
    assert set(architectures.ARCHITECTURES) <= set(report.ARCHITECTURES)


@pytest.mark.parametrize("how, mode", [(runtimes.compiled, "default"), (runtimes.max_autotuned, "max-autotune")])
def test_compiled_runtimes_ask_for_their_mode(how, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    how(lambda case: torch.nn.Identity().eval())(CASE)(torch.zeros(1))
    assert asked == [mode]


def test_channels_last_holds_for_weights_and_images():
    seen = []

    class Model(torch.nn.Conv2d):
        def forward(self, images):
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (self.weight, images)])
            return super().forward(images)

    run = runtimes.channels_last(runtimes.eager, lambda case: Model(3, 4, 3).eval())(CASE)
    run(torch.zeros(2, 3, 8, 8))
    assert seen == [[True, True]]


@pytest.mark.parametrize(
    "make, gigaflop", [(runtimes.theirs, 8.95), (architectures.swin_tiny, 8.98), (architectures.vit_small, 9.20)]
)
def test_flops_of_an_image_are_counted_with_attention_and_for_any_batch(make, gigaflop):
    """The papers count multiply-adds: 4.5 G of each of them."""
    assert runtimes.flops_per_image(Case("tiny_lrf", 224, 8), make) / 1e9 == pytest.approx(gigaflop, abs=0.01)


def test_a_point_of_two_series_is_measured_once(monkeypatch):
    asked = []

    def compared(case, names, rounds):
        asked.append((case.size, case.batch))
        return [{"case": "inference", "variant": case.variant, "runtime": name} for name in names]

    monkeypatch.setattr(scaling, "compared", compared)
    every = [row for found in scaling.of_models(CASE, [224, 640], [1, 64], ["focalnet"], 2) for row in found]
    assert asked == [(224, 1), (640, 1), (224, 64)]
    points = [(row["series"], row["x"]) for row in every]
    assert points == [("image side", 224), ("batch", 1), ("image side", 640), ("batch", 64)]


def test_the_floor_of_an_operator_is_the_larger_of_its_bytes_and_its_arithmetic():
    """7 x 7 x 768 with kernels 3, 5, 7, batch 8: by hand."""
    row = {"stage": "7 x 7 x 768", "case": "forward"}
    case, positions = Case("tiny_lrf", 224, 8), 8 * 7 * 7
    moved = 4 * (3 * positions * 768 + 4 * positions + 83 * 768 + 768 * 769)
    taps = sum(sum(min(7, i + k // 2 + 1) - max(0, i - k // 2) for i in range(7)) ** 2 for k in (3, 5, 7))
    flops = 2 * (8 * 768 * taps + 4 * positions * 768 + positions * 768 * 768)
    for bandwidth, peak, floor in ((1e6, 1e12, moved / 1e6), (1e12, 1e6, flops / 1e6)):
        found = operators.least(row, case, {"bandwidth": bandwidth, "fma_peak": peak})
        assert found["floor_s"] == pytest.approx(floor)
    both = operators.least({**row, "case": "forward and backward"}, case, {"bandwidth": 1e12, "fma_peak": 1e6})
    # Backward does everything thrice.
    assert both["floor_s"] == pytest.approx(4 * found["floor_s"])


def test_peaks_are_the_best_that_was_seen():
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    peaks = Peaks(threads=1)
    first = peaks.measure()
    assert 1e8 < first["bandwidth"] < 1e13
    assert 1e8 < first["fma_peak"] < 1e12
    peaks.fma = peaks.bandwidth = 1e15
    assert peaks.measure() == {"fma_peak": 1e15, "bandwidth": 1e15}
    peaks.dot = 2e15
    assert peaks.measure("bfloat16") == {"fma_peak": 2e15, "bandwidth": 1e15}


@pytest.mark.parametrize(("dot", "peak"), [(2e15, 2e15), (0.0, 1e15)], ids=["dot products", "none"])
def test_the_peak_of_bfloat16_is_that_of_its_dot_products_where_there_are_any(dot, peak, monkeypatch):
    loops = SimpleNamespace(fma_rate=lambda *_: 1e15, dot_rate=lambda *_: dot, read_rate=lambda *_: 1e10)
    monkeypatch.setattr(peaks_module, "_compiled", lambda: loops)
    assert Peaks(threads=1).measure("bfloat16")["fma_peak"] == peak

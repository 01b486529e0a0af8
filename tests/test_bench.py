"""The parts of bench/ that can be wrong without anybody noticing: rows, timing, fits."""

import time

import pytest
import rows
import scaling

from focalnet.benchmark import timing


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


@pytest.mark.parametrize("size, copies", [(1 << 40, 2), (1, timing.MOST_COPIES)])
def test_inputs_rotate_past_the_cache(size, copies):
    assert timing.copies_past_cache(size) == copies

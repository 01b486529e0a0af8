"""bench/gpu.sh keeps its time whatever its parts do, runs them all, and says last how they ended.

The parts here are stand-ins that sleep, fail and resist: no GPU is needed.
"""

import json
import os
import re
import subprocess
import sys
import time

import deadline
import gpu_summary
import pytest
import run as gpu
import torch
from deadline import Part

from focalnet.benchmark import rows


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(deadline, "WORTHWHILE_S", 1.5)
    monkeypatch.setattr(deadline, "INTERRUPT_S", 0.1)
    monkeypatch.setattr(deadline, "GRACE_S", 0.5)


def python(name, code, limit=30.0, promised=0.0):
    return Part(name, (sys.executable, "-S", "-c", code), limit, promised)


def sleeping(name, seconds, limit=30.0, promised=0.0):
    return python(name, f"import time; time.sleep({seconds}); print('done')", limit, promised)


def run(parts, seconds, end_s=0.5, folder=None):
    """How the parts ended, the seconds of the whole, and what was said."""
    said, start = [], time.monotonic()
    ended = deadline.run_all(parts, start + seconds, end_s, folder, say=said.append)
    return {one.part: one for one in ended}, time.monotonic() - start, said


def test_a_part_that_takes_too_long_leaves_the_others_what_they_are_promised(tmp_path):
    parts = [sleeping("greedy", 60), sleeping("promised", 60, promised=2), sleeping("unpromised", 0.1)]
    ended, seconds, _ = run(parts, 5, folder=tmp_path)
    assert seconds <= 5
    assert {name: one.status for name, one in ended.items()} == {
        "greedy": "out of time",
        "promised": "out of time",
        "unpromised": "no time left",
    }
    assert ended["promised"].allowed >= 2 - 0.2


def test_a_part_has_no_more_than_its_limit_however_much_is_left(tmp_path):
    ended, seconds, _ = run([sleeping("limited", 60, limit=2)], 60, folder=tmp_path)
    assert ended["limited"].status == "out of time"
    assert seconds < 3.5


def test_a_part_that_fails_or_cannot_start_does_not_stop_the_rest_and_shows_its_last_lines(tmp_path):
    parts = [
        python("fails", "print('one\\ntwo\\nthree\\nfour\\nfive'); raise SystemExit(3)"),
        Part("missing", ("no-such-program",), 5),
        sleeping("after", 0),
    ]
    ended, _, said = run(parts, 20, folder=tmp_path)
    statuses = [one.status for one in ended.values()]
    assert statuses == ["failed (3)", "failed (could not start)", "passed"]
    assert said[1:6] == ["two", "three", "four", "five", "   fails: failed (3)"]
    assert (tmp_path / "after.log").read_text() == "done\n"


def test_parts_side_by_side_share_the_time_and_each_ends_alone(tmp_path):
    together = (sleeping("long", 60, limit=3), sleeping("short", 1, limit=30), python("fails", "raise SystemExit(3)"))
    ended, *_ = run([together, sleeping("after", 0)], 60, folder=tmp_path)
    statuses = {name: one.status for name, one in ended.items()}
    assert statuses == {"long": "out of time", "short": "passed", "fails": "failed (3)", "after": "passed"}
    assert list(ended) == ["long", "short", "fails", "after"]
    assert ended["short"].seconds < ended["long"].seconds


def test_of_parts_side_by_side_the_largest_promise_is_kept_free(tmp_path):
    together = (sleeping("one", 0, promised=3), sleeping("other", 0, promised=2))
    ended, _, _ = run([sleeping("greedy", 60), together], 6, folder=tmp_path)
    assert ended["greedy"].allowed == pytest.approx(6 - 0.5 - 3, abs=0.2)


def test_somebody_is_told_when_a_part_has_ended(tmp_path):
    told = []
    parts = [python("prints", "print('done')"), sleeping("second", 0)]
    deadline.run_all(parts, time.monotonic() + 20, 0, tmp_path, say=lambda line: None, after=told.append)
    assert told == parts


def test_a_part_that_is_late_may_say_first_how_far_it_came(tmp_path, monkeypatch):
    """As pytest does when it is interrupted."""
    monkeypatch.setattr(deadline, "INTERRUPT_S", 2.0)
    code = (
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(0.2); print('two failed', flush=True)"
    )
    ended, _, said = run([python("tests", code, limit=8), sleeping("after", 0)], 60, folder=tmp_path)
    assert [one.status for one in ended.values()] == ["out of time", "passed"]
    assert "two failed" in said


RESISTS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; "
    "signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep({sleep})
"""


@pytest.mark.parametrize("sleep, limit, status", [(60, 4, "out of time"), (0, 30, "passed")])
def test_what_a_part_has_started_ends_with_it_even_against_its_will(sleep, limit, status, tmp_path):
    ended, seconds, _ = run([python("resists", RESISTS.format(sleep=sleep), limit)], 60, folder=tmp_path)
    assert ended["resists"].status == status
    assert seconds < limit + 2
    child, patience = int((tmp_path / "resists.log").read_text()), time.monotonic() + 5
    while alive(child) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not alive(child)


def alive(pid):
    """Whether a process runs: one that has ended and that nobody has asked about yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("parts, mode, minutes", [(gpu.full, "full", 10), (gpu.quick, "quick", 4)])
def test_the_promises_of_the_script_fit_into_its_time(parts, mode, minutes):
    promised = sum(max(part.promised for part in deadline.parts_of(step)) for step in parts())
    assert promised + gpu.SUMMARY_S + gpu.FIND_GPU_S <= gpu.TOTAL_S[mode] < 60 * minutes


@pytest.mark.parametrize("summary", ["works", "fails", "hangs"])
def test_the_table_is_last_and_the_time_is_kept_whatever_the_summary_does(summary, tmp_path, monkeypatch, capfd):
    code = {"works": "print('the table')", "fails": "raise SystemExit(1)", "hangs": "import time; time.sleep(60)"}[
        summary
    ]
    monkeypatch.setattr(gpu, "SUMMARY", (sys.executable, "-S", "-c", code))
    monkeypatch.setattr(gpu, "SUMMARY_S", 2.0)
    monkeypatch.setattr(gpu, "TOTAL_S", {"quick": 5.0})
    monkeypatch.setattr(gpu, "architecture", lambda: "9.0")
    tests = python("tests", "import os; print(os.environ['TORCH_CUDA_ARCH_LIST']); raise SystemExit(1)")
    monkeypatch.setattr(gpu, "quick", lambda: [tests, sleeping("models", 60)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - start <= 5.5
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "9.0"
    if summary == "works":
        assert lines[-1] == "the table"
    else:
        assert [line.split()[:2] for line in lines[-2:]] == [["tests", "failed"], ["models", "out"]]
    assert [part["part"] for part in json.loads((tmp_path / "parts.json").read_text())] == ["tests", "models"]
    log = (tmp_path / "log.txt").read_text()
    assert log.index("==== tests: ") < log.index("9.0") < log.index("==== models: ")


def test_the_summary_has_every_part_and_the_rows_of_the_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    rows.write([{"case": "inference", "batch": batch} for batch in (1, 8)], "models", gpu_summary.device_name("cpu"))
    ended = [
        deadline.Ended("build", "passed", 80.0, 240.0),
        deadline.Ended("models", "out of time", 90.0, 90.0),
        deadline.Ended("scaling", "no time left", 0.0, 1.0),
    ]
    (tmp_path / "parts.json").write_text(json.dumps([one.row() for one in ended]))
    gpu_summary.main(tmp_path / "parts.json", seconds=170, of=590, device="cpu")
    (path,) = tmp_path.glob("results/*.json")
    document = json.loads(path.read_text())
    assert document["parts"] == [one.row() for one in ended]
    assert [len(document["rows"][kind]) for kind in ("models", "kernels")] == [2, 0]
    assert {"device", "torch", "commit"} <= document["environment"].keys()
    printed = capsys.readouterr().out
    assert "170 s of 590" in printed
    assert "no time left" in printed.splitlines()[-2]


def test_what_is_brought_back_is_eight_files_at_most(tmp_path, monkeypatch):
    """Rows of five kinds, the summary, how the parts ended, and what they printed."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "bench" / "results")
    rows.write([{"case": "old"}], "old", "another device")
    start = time.time()
    os.utime(rows.folder("another device") / "old.json", (start - 60, start - 60))
    for kind in gpu_summary.KINDS:
        rows.write([{"case": kind}], kind, "a GPU")
    rows.folder("a GPU").with_suffix(".json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    gpu.copy_results(out, start - 1)
    names = {path.name for path in out.iterdir()}
    assert names == {"a-gpu.json", *(f"{kind}.json" for kind in gpu_summary.KINDS)}
    assert len(names | {"log.txt", "parts.json"}) <= 8


def test_no_script_writes_rows_of_another_kind():
    for part in gpu.every_part(gpu.full()):
        for script in (word for word in part.command if word.startswith("bench/gpu/")):
            text = (gpu.ROOT / script).read_text()
            written = set(re.findall(r'write\([^"\n]*"(\w+)"', text))
            assert written <= set(gpu_summary.KINDS), script


@pytest.mark.parametrize("steps", [gpu.full(), gpu.quick()], ids=["full", "quick"])
def test_the_package_is_installed_before_what_runs_beside_the_build_imports_it(steps):
    (install,) = gpu.parts_of(steps[0])
    assert "FOCALNET_BUILD=none" in install.command and "pip" in install.command
    assert {part.name for part in steps[1]} == {"build", "precompile", "device"}


def test_what_follows_the_build_is_in_order():
    order = [part.name for part in gpu.every_part(gpu.full()[2:])]
    wanted = ["numbers", "launches", "models", "training", "models-compiled", "training-compiled", "tests-triton"]
    assert [name for name in order if name in wanted] == wanted


def test_every_file_of_the_triton_tests_is_among_those_that_are_run():
    files = {path.stem for path in (gpu.ROOT / "tests" / "triton").glob("test_*.py")}
    assert files == set(gpu.TRITON_FILES)


def test_every_file_of_the_cuda_tests_that_needs_a_gpu_is_among_those_that_are_run():
    files = (gpu.ROOT / "tests" / "cuda").glob("test_*.py")
    marked = {f"tests/cuda/{path.name}" for path in files if "pytest.mark.gpu" in path.read_text()}
    assert marked == set(gpu.CUDA_FILES)


def test_the_script_says_where_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = os.path.join(gpu.ROOT, "bench", "gpu.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    ended = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2
    assert "no CUDA device" in ended.stderr


@pytest.mark.slow
def test_a_dry_run_takes_every_part_to_its_first_cuda_call(tmp_path):
    script = os.path.join(gpu.ROOT, "bench", "gpu.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    ended = subprocess.run(
        ["bash", script, "--dry-run"], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stdout
    for part in gpu.every_part(gpu.full()):
        log = (tmp_path / f"{part.name}.log").read_text()
        if "bench/" in " ".join(part.command):
            assert "reached the first CUDA call" in log, f"{part.name}: {log[-500:]}"


def test_a_dry_run_finds_a_part_that_does_not_start(tmp_path, monkeypatch, capfd):
    script = tmp_path / "broken.py"
    script.write_text("import torch\nimport a_module_that_nobody_has\n")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert gpu.dry_run([gpu._python("broken", (str(script),), 10)]) == 1
    assert "a_module_that_nobody_has" in capfd.readouterr().out

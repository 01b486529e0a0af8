"""Runs everything that needs a GPU within one deadline: build, measurements, tests on the device, a summary table.

    bench/gpu.sh             under ten minutes
    bench/gpu.sh --quick     under four minutes
    bench/gpu.sh --dry-run   no GPU needed: every part's Python up to its first CUDA call; tests are collected

It needs torch >= 2.10 with CUDA, triton, nvcc, transformers, pytest and ninja, and no network. pytest-xdist, timm, ncu
and compute-sanitizer are used if they are installed. `deadline` limits the time of each part; the most telling parts
come first. Every measurement is on disk as soon as it exists, so a part that fails, is stopped or finds no time left
loses itself alone.

The rows go to bench/results/<device>/. $OUT (default: a new folder) gets copies of them after each part, the summary,
and the output of every part in log.txt: eight files at most. This file needs only the standard library, so that a
broken environment is reported like any other failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from deadline import SHOWN_LINES, Ended, Part, Step, parts_of, run_all

ROOT = Path(__file__).resolve().parents[2]
# Seconds of the whole; a little under what is promised to people, for starting and ending.
TOTAL_S = {"full": 590.0, "quick": 230.0}
SUMMARY_S = 20.0
FIND_GPU_S = 40.0
# Of a part of a dry run. Nothing there should take long, on a slow machine either.
DRY_S = 240.0
# What building needs: the packages of pyproject.toml's build system, and a compiler.
CHECK_BUILD = """
import importlib.util, shutil, sys
absent = [name for name in ("setuptools", "wheel", "pybind11", "ninja", "torch") if not importlib.util.find_spec(name)]
absent += [] if shutil.which("nvcc") else ["nvcc"]
sys.exit(f"to build, these are missing: {', '.join(absent)}" if absent else 0)
"""

SUMMARY = (sys.executable, "bench/gpu/gpu_summary.py")

# A line for each test as it ends, so that the log of a part that ran out of time says how far it came.
PYTEST = (
    "-m",
    "pytest",
    "-v",
    "--tb=short",
    "--import-mode=importlib",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
)
PIP = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
# Without the extension first: what runs beside the build imports focalnet.
INSTALL = ("env", "FOCALNET_BUILD=none", *PIP)
BUILD = ("env", "FOCALNET_BUILD=cuda", *PIP)


def _processes(count: int) -> tuple[str, ...]:
    return ("-n", str(count), "--maxschedchunk", "1") if importlib.util.find_spec("xdist") else ()


# The most telling ones first: real stages, the packed projection, then the sweep of small shapes.
TRITON_FILES = (
    "test_production_tiles", "test_packed_projection", "test_gated_aggregation", "test_candidates", "test_residual",
    "test_gelu",
)  # fmt: skip
TRITON_TESTS = (*PYTEST, *_processes(11), *(f"tests/triton/{name}.py" for name in TRITON_FILES))
CUDA_FILES = ("tests/cuda/test_cuda_device.py", "tests/cuda/test_models_on_a_gpu.py")
CUDA_TESTS = (*PYTEST, *_processes(4), "-m", "gpu", *CUDA_FILES)
SANITIZED_TESTS = (*PYTEST, "-m", "gpu", CUDA_FILES[0], "-x", "-k", "obey and 1x1")
BACKEND_TESTS = (*PYTEST, *_processes(4), "tests/operators/test_backends.py")
TINY = ("--variant", "tiny_lrf", "--dtype", "bfloat16")
# At its published size of 384 pixels.
LARGE = ("--variant", "large_fl3", "--dtype", "bfloat16", "--size", "384", "--batch", "32")
KERNELS = ("bench/gpu/gpu_kernels.py", *TINY, "--rounds")
OURS = ("--runtime", "focalnet, triton", "--runtime", "focalnet, cuda", "--runtime", "focalnet")
INDUCTOR = ("--runtime", "reference, torch.compile", "--runtime", "reference")
MODELS = ("bench/models.py", "--device", "cuda", *TINY, "--batch", "128", "--rounds")
LARGE_MODELS = ("bench/models.py", "--device", "cuda", *LARGE, "--rounds")


def _runtimes(*names: str) -> tuple[str, ...]:
    return tuple(argument for name in ("focalnet", *names) for argument in ("--runtime", name))


PLAIN = _runtimes("transformers")
EAGER = _runtimes("transformers", "transformers, patched", "timm, channels-last")
# Parts of their own: each of these takes half a minute to start.
COMPILED = _runtimes("focalnet, compile", "transformers, compile", "timm, channels-last, compile")


def _before(build_limit: float, promised: float) -> tuple[Part, ...]:
    """Side by side: the extension needs a compiler, the Triton kernels need the other processors."""
    return (
        Part("build", BUILD, build_limit, promised),
        _python("precompile", ("bench/gpu/gpu_precompile.py", "--processes", "14"), build_limit, promised),
        _python("device", ("bench/gpu/gpu_device.py",), 60, 15),
    )


def _tests(limit: float, promised: float) -> tuple[Part, ...]:
    """Side by side: neither measures, and most tests of Triton wait for its compiler."""
    return (
        _python("tests-triton", TRITON_TESTS, limit, promised),
        _python("tests-cuda", CUDA_TESTS, limit, promised),
    )


def full() -> list[Step]:
    """The steps of ten minutes, each part with its limit and what it is promised; the most telling ones first.

    Seen on an H100 and an H200 with 16 cores: building 70 to 78 s, compiling 139 launches 40 s, device and info 6 s
    each, all tests of Triton 43 s where their kernels had been compiled before, those of `cuda` 58 s.
    """
    return [
        Part("install", INSTALL, 30, 8),
        _before(120, 80),
        _python("info", ("-m", "focalnet.cli", "info"), 20, 6),
        _python("numbers", ("bench/gpu/gpu_numbers.py",), 60, 30),
        _python("launches", ("bench/gpu/gpu_launches.py",), 45, 25),
        _python("models", (*MODELS, "9", *EAGER), 60, 35),
        _python("training", (*MODELS, "9", "--train", *EAGER), 60, 35),
        _python("models-compiled", (*MODELS, "9", *COMPILED), 90, 40),
        _python("training-compiled", (*MODELS, "7", "--train", *COMPILED), 90, 30),
        _tests(120, 60),
        _python("replay", ("bench/gpu/gpu_replay.py",), 30, 12),
        _python("models-large", (*LARGE_MODELS, "5", *EAGER), 60, 20),
        _python("training-large", (*LARGE_MODELS, "5", "--train", *EAGER), 60, 20),
        _python("tests-backends", BACKEND_TESTS, 60, 20),
        _python("ncu", ("bench/gpu/gpu_ncu.py",), 70, 20),
        _python("kernels", (*KERNELS, "11", *OURS), 50, 20),
        _python("convolutions", ("bench/gpu/gpu_convolutions.py",), 30, 10),
        _python("inductor", (*KERNELS, "7", *INDUCTOR, "--operators-only"), 75, 10),
        _python("sweep", ("bench/gpu/gpu_sweep.py",), 60, 10),
        _python("models-large-compiled", (*LARGE_MODELS, "5", *COMPILED), 90),
        *_sanitizers(),
    ]


def quick() -> list[Step]:
    """The steps of four minutes: fewer rounds and runtimes, no sweep, no sanitizer, no large model."""
    return [
        Part("install", INSTALL, 20, 5),
        _before(90, 75),
        _python("info", ("-m", "focalnet.cli", "info"), 15, 5),
        _python("numbers", ("bench/gpu/gpu_numbers.py",), 40, 20),
        _python("launches", ("bench/gpu/gpu_launches.py",), 30, 15),
        _python("models", (*MODELS, "5", *PLAIN), 35, 15),
        _python("training", (*MODELS, "5", "--train", *PLAIN), 35, 10),
        _tests(60, 20),
        _python("kernels", (*KERNELS, "5", *OURS), 30),
        _python("tests-backends", BACKEND_TESTS, 45),
    ]


def every_part(steps: list[Step]) -> list[Part]:
    return [part for step in steps for part in parts_of(step)]


def _python(name: str, arguments: tuple[str, ...], limit: float, promised: float = 0.0) -> Part:
    return Part(name, (sys.executable, *arguments), limit, promised)


def dry(parts: list[Part]) -> list[Part]:
    """What is no script of this project, as far as it gets without a GPU; nothing is built and nothing is written."""
    return [replace(part, command=_dry_command(part), limit=DRY_S, promised=0.0) for part in parts]


def _dry_command(part: Part) -> tuple[str, ...]:
    if _is_of_pip(part):
        return (sys.executable, "-c", CHECK_BUILD)
    return (sys.executable, *_arguments(part), "--collect-only")


def _arguments(part: Part) -> tuple[str, ...]:
    return part.command[part.command.index(sys.executable) + 1 :]


def _is_of_pip(part: Part) -> bool:
    return "pip" in part.command


def _is_script(part: Part) -> bool:
    return not _is_of_pip(part) and "pytest" not in part.command


def dry_scripts(parts: list[Part], folder: Path) -> list[Ended]:
    """How the scripts ended, up to their first CUDA call: forks of one process, since most of a run are imports."""
    file = folder / "runs.json"
    logs = [folder / f"{part.name}.log" for part in parts]
    runs = [
        {"arguments": _arguments(part), "log": str(log), "limit_s": DRY_S}
        for part, log in zip(parts, logs, strict=True)
    ]
    file.write_text(json.dumps(runs))
    start = time.monotonic()
    subprocess.run([sys.executable, "bench/gpu/dry.py", "--each", str(file)], timeout=DRY_S * len(parts), check=False)
    seconds = round(time.monotonic() - start, 1)
    ended = []
    for part, log, run in zip(parts, logs, json.loads(file.read_text()), strict=True):
        code = run.get("status", "did not run")
        status = "passed" if code == 0 else "out of time" if code is None else f"failed ({code})"
        ended.append(Ended(part.name, status, seconds, DRY_S))
        if code != 0 and log.exists():
            print(*log.read_text(errors="replace").splitlines()[-SHOWN_LINES:], sep="\n")
    return ended


def _sanitizers() -> list[Part]:
    sanitizer = shutil.which("compute-sanitizer")
    tests = (sys.executable, *SANITIZED_TESTS)
    tools = ("memcheck", "racecheck") if sanitizer else ()
    return [
        Part(f"sanitizer-{tool}", (sanitizer, "--tool", tool, "--error-exitcode", "1", *tests), 60) for tool in tools
    ]


def main() -> int:
    """0 where every part passed, 1 where one did not, 2 where there is no GPU."""
    mode = "quick" if "--quick" in sys.argv[1:] else "full"
    if "--dry-run" in sys.argv[1:]:
        return dry_run(quick() if mode == "quick" else full())
    deadline = time.monotonic() + TOTAL_S[mode]
    arch = architecture()
    if arch is None:
        print("bench/gpu.sh: torch finds no CUDA device here; see focalnet info", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": arch}
    os.chdir(ROOT)
    steps = quick() if mode == "quick" else full()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)

        def after(part: Part) -> None:
            append_log(out / "log.txt", part, logs)
            copy_results(out, start)

        ended = run_all(steps, deadline, SUMMARY_S, logs, environment, after=after)
    whole = summarize(ended, deadline, TOTAL_S[mode], out)
    copy_results(out, start)
    return int(not whole or any(one.status != "passed" for one in ended))


def append_log(log: Path, part: Part, logs: Path) -> None:
    """Add what a part printed."""
    mine = logs / f"{part.name}.log"
    if mine.exists():
        with log.open("a") as file:
            file.write(f"==== {part.name}: {' '.join(part.command)}\n{mine.read_text(errors='replace')}\n")


def copy_results(out: Path, start: float) -> None:
    """Copy the rows and the summary that were written since ``start``: files of one device have different names."""
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        if path.stat().st_mtime >= start:
            shutil.copy(path, out / path.name)


def dry_run(steps: list[Step]) -> int:
    """0 where every part gets to its first CUDA call, 1 where one does not."""
    os.chdir(ROOT)
    folder = Path(os.environ.get("OUT") or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    scripts, others = ([part for part in every_part(steps) if _is_script(part) == which] for which in (True, False))
    ended, others = dry_scripts(scripts, folder), dry(others)
    in_pairs = [tuple(others[first : first + 2]) for first in range(0, len(others), 2)]
    ended += run_all(in_pairs, time.monotonic() + DRY_S * len(in_pairs), 0.0, folder)
    print(*(f"{one.part:20} {one.status:24} {one.seconds:6.0f} s" for one in ended), sep="\n")
    return int(any(one.status != "passed" for one in ended))


def architecture() -> str | None:
    """The compute capability of the GPU, "9.0", or None without one."""
    ask = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    try:
        asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=FIND_GPU_S)
    except subprocess.TimeoutExpired:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def summarize(ended: list[Ended], deadline: float, total: float, folder: Path) -> bool:
    """The table, last: by gpu_summary.py, which also writes the JSON, or plainly where that does not work (False)."""
    parts = folder / "parts.json"  # what the summary is made of, and all there is where it fails
    parts.write_text(json.dumps([one.row() for one in ended], indent=1))
    seconds = total - (deadline - time.monotonic())
    command = [*SUMMARY, str(parts), "--seconds", f"{seconds:.0f}", "--of", f"{total:.0f}"]
    sys.stdout.flush()
    try:
        if subprocess.run(command, timeout=max(1.0, deadline - time.monotonic()), check=False).returncode == 0:
            return True
        print("bench/gpu/gpu_summary.py failed")
    except subprocess.TimeoutExpired:
        print("bench/gpu/gpu_summary.py took too long")
    for one in ended:
        print(f"{one.part:20} {one.status:24} {one.seconds:6.0f} s of {one.allowed:.0f}")
    return False


if __name__ == "__main__":
    sys.exit(main())

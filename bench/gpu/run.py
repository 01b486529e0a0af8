"""Runs everything that needs a GPU within one deadline: build, tests on the device, measurements, a summary table.

    bench/gpu.sh             under ten minutes
    bench/gpu.sh --quick     under four minutes
    bench/gpu.sh --dry-run   no GPU needed: every part's Python up to its first CUDA call; tests are collected

It needs torch >= 2.10 with CUDA, triton, nvcc, transformers, pytest and ninja, and no network. timm is measured if it
is installed. `deadline` limits the time of each part. Parts that fail, are stopped or find no time left are listed.
The rows go to bench/results/<device>/, the output of every part to $OUT (default: a new folder), and the summary to
bench/results/<device>.json. This file needs only the standard library, so that a broken environment is reported like
any other failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from deadline import Ended, Part, run_all

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

PYTEST = ("-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider")
BUILD = (
    "env",
    "FOCALNET_BUILD=cuda",
    sys.executable,
    "-m",
    "pip",
    "install",
    "-q",
    "--no-build-isolation",
    "--no-deps",
    "-e",
    ".",
)
TRITON_TESTS = (*PYTEST, "tests/triton")
CUDA_TESTS = (*PYTEST, "-m", "gpu", "tests/cuda/test_cuda_device.py")
BACKEND_TESTS = (*PYTEST, "tests/operators/test_backends.py")
KERNELS = ("bench/gpu/gpu_kernels.py", "--variant", "tiny_lrf", "--dtype", "bfloat16", "--rounds")
MODELS = ("bench/models.py", "--device", "cuda", "--dtype", "bfloat16", "--batch", "128", "--rounds")
SCALING = ("bench/scaling.py", "--device", "cuda", "--dtype", "bfloat16", "--runtime", "focalnet")


def _runtimes(*names: str) -> tuple[str, ...]:
    return tuple(argument for name in ("focalnet", *names) for argument in ("--runtime", name))


PLAIN = _runtimes("transformers")
EAGER = _runtimes("transformers", "transformers, patched", "timm", "timm, channels-last")
# A part of their own: each takes half a minute to start.
COMPILED = _runtimes("focalnet, compile", "transformers, compile", "timm, channels-last, compile")


def full() -> list[Part]:
    """The parts of ten minutes, each with its limit and what it is promised."""
    return [
        Part("build", BUILD, 240, 90),
        _python("info", ("-m", "focalnet.cli", "info"), 30, 10),
        _python("tests-triton", TRITON_TESTS, 120, 60),
        _python("tests-cuda", CUDA_TESTS, 120, 40),
        _python("tests-backends", BACKEND_TESTS, 60, 20),
        _python("kernels", (*KERNELS, "11"), 150, 70),
        _python("models", (*MODELS, "11", *EAGER), 90, 60),
        _python("training", (*MODELS, "11", "--train", *EAGER), 90, 60),
        _python("models-compiled", (*MODELS, "11", *COMPILED), 150),
        *_sanitizers(),
        _python("training-compiled", (*MODELS, "7", "--train", *COMPILED), 150),
        _python("scaling", SCALING, 120),
    ]


def quick() -> list[Part]:
    """The parts of four minutes: fewer rounds and runtimes, no sanitizer, no scaling."""
    return [
        Part("build", BUILD, 110, 60),
        _python("info", ("-m", "focalnet.cli", "info"), 15, 5),
        _python("tests-triton", TRITON_TESTS, 60, 25),
        _python("tests-cuda", CUDA_TESTS, 45, 20),
        _python("kernels", (*KERNELS, "5"), 60, 25),
        _python("models", (*MODELS, "5", *PLAIN), 45, 25),
        _python("training", (*MODELS, "5", "--train", *PLAIN), 45),
        _python("tests-backends", BACKEND_TESTS, 45),
    ]


def _python(name: str, arguments: tuple[str, ...], limit: float, promised: float = 0.0) -> Part:
    return Part(name, (sys.executable, *arguments), limit, promised)


def dry(parts: list[Part]) -> list[Part]:
    """The same parts, as far as they get without a GPU; nothing is built and nothing is written."""
    return [replace(part, command=_dry_command(part), limit=DRY_S, promised=0.0) for part in parts]


def _dry_command(part: Part) -> tuple[str, ...]:
    if part.name == "build":
        return (sys.executable, "-c", CHECK_BUILD)
    python = part.command.index(sys.executable)
    arguments = part.command[python + 1 :]
    if "pytest" in arguments:
        return (sys.executable, *arguments, "--collect-only")
    return (sys.executable, "bench/gpu/dry.py", *arguments)


def _sanitizers() -> list[Part]:
    sanitizer = shutil.which("compute-sanitizer")
    tests = (sys.executable, *CUDA_TESTS, "-x", "-k", "obey and 1x1")
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
    folder = Path(os.environ.get("OUT") or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": arch}
    os.chdir(ROOT)
    parts = quick() if mode == "quick" else full()
    ended = run_all(parts, deadline, SUMMARY_S, folder, environment)
    whole = summarize(ended, deadline, TOTAL_S[mode], folder)
    return int(not whole or any(one.status != "passed" for one in ended))


def dry_run(parts: list[Part]) -> int:
    """0 where every part gets to its first CUDA call, 1 where one does not."""
    os.chdir(ROOT)
    folder = Path(os.environ.get("OUT") or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    ended = run_all(dry(parts), time.monotonic() + DRY_S * len(parts), 0.0, folder)
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
    parts = folder / "parts.json"
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

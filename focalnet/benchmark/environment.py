"""Where and with what a row was measured."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from .._version import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "timm", "onnxruntime", "openvino")


def facts(kind: str = "cpu") -> dict[str, object]:
    """Device, versions and commit, as every row has them; ``kind`` is "cpu" or "cuda"."""
    common = {"device": device(kind), "commit": commit(), **versions()}
    return common | (_gpu_facts() if kind == "cuda" else {"threads": len(os.sched_getaffinity(0))})


def device(kind: str = "cpu") -> str:
    """The name of the GPU or the processor."""
    return _gpu_name() if kind == "cuda" else _cpu_name()


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _gpu_facts() -> dict[str, object]:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {"driver": driver.stdout.split("\n")[0].strip() if driver else None, "cuda": torch.version.cuda}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"focalnet": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit, with "+" where the tree has changes; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":!bench/results"], capture_output=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")


_FMA_LOOP = r"""
#include <pthread.h>
#include <time.h>
typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define START(i) vec a##i = (vec){} + (float)(i + 1);
/* The empty statement hides from the compiler that the chains are alike. */
#define STEP(i) a##i = a##i * b + c; asm volatile("" : "+x"(a##i));
#define ADD(i) sink += a##i[0];
static void* loop(void* argument) {
    long steps = *(long*)argument;
    volatile float factor = 0.999f, sink = 0;
    const vec b = (vec){} + factor, c = (vec){} + 0.001f;
    EACH(START)
    for (long s = 0; s < steps; ++s) { EACH(STEP) }
    EACH(ADD)
    return 0;
}
double fma_rate(int threads, long steps) {
    pthread_t ids[256];
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    for (int i = 0; i < threads; ++i) pthread_create(&ids[i], 0, loop, &steps);
    for (int i = 0; i < threads; ++i) pthread_join(ids[i], 0);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    double seconds = (t1.tv_sec - t0.tv_sec) + 1e-9 * (t1.tv_nsec - t0.tv_nsec);
    return 2.0 * 12 * (VECTOR_BYTES / 4) * steps * threads / seconds;
}
"""


def fma_peak(threads: int) -> float:
    """Float32 multiply-adds this machine can do at best, in FLOP/s: a loop on registers alone, best of several."""
    vector_bytes = 64 if "avx512f" in Path("/proc/cpuinfo").read_text() else 32
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(_FMA_LOOP)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["cc", *flags, f"-DVECTOR_BYTES={vector_bytes}", source, "-o", library], check=True)
        rate = ctypes.CDLL(str(library)).fma_rate
        rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long]
        return max(rate(threads, 20_000_000) for _ in range(5))

"""Measures the peak rates of the processor: multiply-adds in registers, and bytes read from memory.

Both are loops in C, compiled on the machine that runs them. Each thread uses its own registers or its own buffer.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

_LOOPS = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define START(i) vec a##i = (vec){} + (float)(i + 1);
/* The empty statement hides from the compiler that the chains are alike. */
#define STEP(i) a##i = a##i * b + c; asm volatile("" : "+x"(a##i));
#define ADD(i) sink += a##i[0];
static void* multiply_add(void* argument) {
    long steps = *(long*)argument;
    volatile float factor = 0.999f, sink = 0;
    const vec b = (vec){} + factor, c = (vec){} + 0.001f;
    EACH(START)
    for (long s = 0; s < steps; ++s) { EACH(STEP) }
    EACH(ADD)
    return 0;
}
#ifdef __AVX512BF16__
#include <immintrin.h>
#define STEP_PAIRS(i) a##i = (vec)_mm512_dpbf16_ps((__m512)a##i, b, b); asm volatile("" : "+x"(a##i));
static void* dot(void* argument) {
    long steps = *(long*)argument;
    volatile float sink = 0;
    const __m512bh b = (__m512bh)_mm512_set1_epi32(0x3a003a00);
    EACH(START)
    for (long s = 0; s < steps; ++s) { EACH(STEP_PAIRS) }
    EACH(ADD)
    return 0;
}
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
/* Linux grants the tiles to a process that asks. */
static int has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
/* Four products of 16 x 32 by 32 x 16 a step, of tiles that hold zeros. */
static void* multiply_tiles(void* argument) {
    long steps = *(long*)argument;
    struct { unsigned char palette, start, rest[14]; unsigned short bytes[16]; unsigned char rows[16]; } shapes = {1};
    for (int i = 0; i < 8; ++i) { shapes.bytes[i] = 64; shapes.rows[i] = 16; }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
    for (long s = 0; s < steps; ++s)
        asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
                     "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
    asm volatile("tilerelease");
    return 0;
}
#endif
typedef struct { vec* data; long count; } span;
#define LOAD(i) a##i += data[at + i];
static void* read_all(void* argument) {
    const vec* data = ((span*)argument)->data;
    long count = ((span*)argument)->count / 12 * 12;
    volatile float sink = 0;
    EACH(START)
    for (long at = 0; at < count; at += 12) { EACH(LOAD) }
    EACH(ADD)
    return 0;
}
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
static double seconds(int threads, void* (*loop)(void*), void* arguments, long stride) {
    pthread_t ids[256];
    double start = now();
    for (int i = 0; i < threads; ++i) pthread_create(&ids[i], 0, loop, (char*)arguments + i * stride);
    for (int i = 0; i < threads; ++i) pthread_join(ids[i], 0);
    return now() - start;
}
double fma_rate(int threads, long steps) {
    return 2.0 * 12 * (VECTOR_BYTES / 4) * steps * threads / seconds(threads, multiply_add, &steps, 0);
}
double dot_rate(int threads, long steps) {
#ifdef __AMX_BF16__
    if (has_tiles()) {
        steps /= 16;
        return 2.0 * 4 * 16 * 16 * 32 * steps * threads / seconds(threads, multiply_tiles, &steps, 0);
    }
#endif
#ifdef __AVX512BF16__
    return 2.0 * 12 * 32 * steps * threads / seconds(threads, dot, &steps, 0);
#else
    return 0;
#endif
}
double read_rate(int threads, long bytes) {
    span spans[256];
    double best = 0;
    for (int i = 0; i < threads; ++i) {
        spans[i].data = aligned_alloc(VECTOR_BYTES, bytes);
        spans[i].count = bytes / VECTOR_BYTES;
        memset(spans[i].data, 0, bytes);
    }
    for (int run = 0; run < 5; ++run) {
        double rate = (double)bytes * threads / seconds(threads, read_all, spans, sizeof(span));
        if (rate > best) best = rate;
    }
    for (int i = 0; i < threads; ++i) free(spans[i].data);
    return best;
}
"""


class Peaks:
    """FLOP/s and bytes/s of this processor: the maximum over all calls of `measure`. Noise only lowers them.

    Attributes:
        fma: float32 multiply-adds, FLOP/s (a multiply-add is two).
        dot: products of bfloat16 on AMX's tiles or else of AVX512_BF16, FLOP/s; 0 with neither.
        bandwidth: bytes/s read from memory.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = min(256, threads or len(os.sched_getaffinity(0)))
        self._loops = _compiled()
        self.fma = self.dot = self.bandwidth = 0.0

    def measure(self, dtype: str = "float32") -> dict[str, float]:
        """Measure for half a second. Returns ``fma_peak``, the peak of arithmetic for ``dtype``, and ``bandwidth``.

        The arithmetic for bfloat16 is products of bfloat16 if the processor has them, else float32 multiply-adds.
        """
        self.fma = max(self.fma, *(self._loops.fma_rate(self._threads, 20_000_000) for _ in range(5)))
        if dtype == "bfloat16":
            self.dot = max(self.dot, *(self._loops.dot_rate(self._threads, 20_000_000) for _ in range(5)))
        # 256 MB over all threads, which exceeds any cache.
        per_thread = (256 << 20) // self._threads // 64 * 64
        self.bandwidth = max(self.bandwidth, self._loops.read_rate(self._threads, per_thread))
        peak = self.dot if dtype == "bfloat16" and self.dot else self.fma
        return {"fma_peak": peak, "bandwidth": self.bandwidth}


def _compiled() -> ctypes.CDLL:
    vector_bytes = 64 if "avx512f" in Path("/proc/cpuinfo").read_text() else 32
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loops.c"), Path(folder, "loops.so")
        source.write_text(_LOOPS)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["cc", *flags, f"-DVECTOR_BYTES={vector_bytes}", source, "-o", library], check=True)
        loops = ctypes.CDLL(str(library))
    for rate in (loops.fma_rate, loops.dot_rate, loops.read_rate):
        rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long]
    return loops

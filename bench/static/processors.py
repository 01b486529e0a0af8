"""What the multiprocessors of a GPU can do in a clock, and how many programs fit on one.

Rates are a multiprocessor's, in instructions of a warp: 32 lanes of 32 bits. Sources: CUDA C++ Programming Guide,
tables "Throughput of Native Arithmetic Instructions" and "Technical Specifications per Compute Capability"; clocks,
memory and matrix rates from the data sheets and white papers (GA100, AD102, GH100, GB200). The bandwidth of the L2 is
a round figure near what microbenchmarks of an A100 and an H100 report; those of the other two are estimates.

The matrix rate of a data sheet is that of a group's instruction (wgmma, tcgen05.mma). A warp's own mma.sync reaches
about 62 percent of it on an H100 (Luo et al., arXiv:2402.13499), and all of it on the two without such instructions.
On a B200 no figure was found: the absolute rate of the H100 is assumed. m16n8k8 is charged half of m16n8k16.
"""

from __future__ import annotations

from dataclasses import dataclass

from focalnet.kernels import plan

SCHEDULERS = 4
REGISTERS = 65536
MAX_PROGRAMS = 32
RESERVED_BYTES = 1024  # of shared memory, by the driver, for every program
# Seconds from the end of a kernel to the start of the next on the same stream: a microsecond or two on these devices.
GAP = 2e-6


@dataclass(frozen=True)
class Processor:
    """A GPU of ``device.sm_count`` multiprocessors. ``tensor``: multiply-adds a clock and multiprocessor, 16 bit;
    ``mma``: the share of them that mma.sync reaches."""

    name: str
    device: plan.Device
    clock: float
    bandwidth: float
    l2_bandwidth: float
    fma: float
    tensor: float
    max_warps: int
    shared_bytes: int
    alu: float = 2.0
    special: float = 0.5
    memory: float = 1.0
    mma: float = 1.0

    def rate(self, pipe: str) -> float:
        """Instructions of a warp that the pipe takes in a clock; tensor cores: multiply-adds."""
        rates = {"fma": self.fma, "alu": self.alu, "special": self.special, "memory": self.memory}
        return rates.get(pipe, self.tensor if pipe == "tensor" else float(SCHEDULERS))

    def programs_per_sm(self, registers: int, shared: int, threads: int) -> int:
        """How many programs of so many registers a thread are resident on a multiprocessor."""
        # Registers are given to warps in units of 256.
        of_warp = -(-32 * registers // 256) * 256
        warps = -(-threads // 32)
        limits = (
            REGISTERS // (of_warp * warps),
            self.shared_bytes // (shared + RESERVED_BYTES),
            self.max_warps // warps,
            MAX_PROGRAMS,
        )
        return max(1, min(limits))


A100 = Processor("A100", plan.A100, 1.41e9, 2.039e12, 5.1e12, 2, 1024, 64, 167936)
RTX_4090 = Processor("RTX 4090", plan.RTX_4090, 2.52e9, 1.008e12, 5.0e12, 4, 256, 48, 102400)
H100 = Processor("H100", plan.H100, 1.755e9, 3.35e12, 5.5e12, 4, 2048, 64, 233472, mma=0.62)
B200 = Processor("B200", plan.B200, 1.85e9, 8.0e12, 10.0e12, 4, 4096, 64, 233472, mma=0.31)
PROCESSORS = {one.name: one for one in (A100, RTX_4090, H100, B200)}

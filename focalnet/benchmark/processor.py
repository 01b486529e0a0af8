"""Identifies the processor of a result row. The name is not enough: Zen 3 and Zen 4 can both be "AMD EPYC"."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that decide which kernels run, named as in Linux, each group from narrowest to widest.
INSTRUCTION_SETS = (
    ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    ("asimd", "asimddp", "sve", "bf16", "sve2", "sme"),
)
# Environment variables that restrict the instruction sets in use.
LIMITS = ("FOCALNET_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Processor:
    """A processor.

    Attributes:
        name: the vendor's name.
        family: number that the processor reports, or None.
        model: number that the processor reports, or None.
        instruction_sets: those of INSTRUCTION_SETS that it has.
        cores: number of cores that this process may use.
        limits: settings of the LIMITS that are in effect.
    """

    name: str
    family: str | None
    model: str | None
    instruction_sets: tuple[str, ...]
    cores: int
    limits: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = " ".join(f"{what} {n}" for what, n in (("family", self.family), ("model", self.model)) if n is not None)
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        return ", ".join(filter(None, [self.name, kind, *self.instruction_sets[-1:], cores, *self.limits]))

    def row(self) -> dict[str, object]:
        """The processor as JSON values for a result row."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets), "limits": list(self.limits)}


def here() -> Processor:
    """The processor of this machine, with the cores that this process may use."""
    cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = tuple(f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name))
    return described(cpuinfo, cores, limits)


def described(cpuinfo: str, cores: int, limits: tuple[str, ...] = ()) -> Processor:
    """The first processor in the text of Linux's /proc/cpuinfo, x86 or ARM. Without text, Python's name is used."""
    facts = {}
    for line in cpuinfo.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return Processor(
        name=facts.get("model name") or platform.processor() or platform.machine(),
        family=facts.get("cpu family", facts.get("CPU implementer")),
        model=facts.get("model", facts.get("CPU part")),
        instruction_sets=tuple(name for group in INSTRUCTION_SETS for name in group if name in flags),
        cores=cores,
        limits=limits,
    )

"""Which processor a row was measured on: its name alone does not tell, Zen 3 and Zen 4 are both "AMD EPYC"."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# As Linux names them, each group from the narrowest to the widest: what decides which kernels run.
INSTRUCTION_SETS = (
    ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    ("asimd", "asimddp", "sve", "bf16", "sve2", "sme"),
)
# Each makes a processor act as a lesser one.
LIMITS = ("FOCALNET_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Processor:
    """``name`` is the vendor's; ``family`` and ``model`` are numbers as the processor reports them, None where it
    reports none; ``cores`` those that this process may use; ``limits`` the environment variables that hold it back."""

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
        """As rows have it."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets), "limits": list(self.limits)}


def here() -> Processor:
    """The processor of this machine, as far as this process may use it."""
    cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = tuple(f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name))
    return described(cpuinfo, cores, limits)


def described(cpuinfo: str, cores: int, limits: tuple[str, ...] = ()) -> Processor:
    """The first processor of Linux's /proc/cpuinfo, an x86 or an ARM; of an empty text what Python knows."""
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

"""``focalnet info``: shows installed versions, the hardware of this machine, and the backends that run on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = ("float32", "bfloat16", "float16")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show versions, devices, the compiled extension, and each backend with the reason why it cannot run here."""
    gathered = gather()
    if as_json:
        typer.echo(json.dumps(gathered, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for section in ("versions", "machine", "extension"):
        console.print(_facts(section, gathered[section]))
    console.print(_backend_table(gathered["backends"], gathered["extension"]["reason"]))
    for device in gathered["automatic"]:
        console.print(automatic_line(device, gathered["automatic_by_dtype"][device]), soft_wrap=True)
    if requested := gathered["requested"]:
        effect = "overrides this" if requested in gathered["backends"] else "names no backend: no operator will run"
        console.print(f"FOCALNET_BACKEND={requested} {effect}", markup=False)


def gather() -> dict[str, Any]:
    """Everything that `focalnet info` shows, as JSON values."""
    from ..backends.registry import backends

    return {
        "versions": _versions(),
        "machine": _machine(),
        "extension": _extension(),
        "backends": backends(),
        "automatic": {device: automatic_backend(device) for device in _devices()},
        "automatic_by_dtype": {
            device: {dtype: automatic_backend(device, dtype) for dtype in DTYPES} for device in _devices()
        },
        "requested": os.environ.get("FOCALNET_BACKEND") or None,
    }


def automatic_backend(device: str, dtype: str = "float32") -> str:
    """The backend chosen automatically on a device ("cpu" or "cuda"), for a batch of the first stage of FocalNet-T."""
    import torch

    from ..backends.problem import Problem
    from ..backends.registry import automatic

    kernel_sizes = ((3, 3), (5, 5), (7, 7))
    problem = Problem("focal_modulation", torch.device(device), getattr(torch, dtype), 128, 56, 56, 96, kernel_sizes)
    return automatic(problem)


def automatic_line(device: str, by_dtype: dict[str, str]) -> str:
    """What is chosen on a device: one backend, or one for each dtype, which the sizes of a call may change."""
    if len(set(by_dtype.values())) == 1 and device != "cuda":
        return f"Chosen automatically on {device}: {by_dtype['float32']}"
    shown = ", ".join(f"{backend} in {dtype}" for dtype, backend in by_dtype.items())
    table = "; other sizes: focalnet/backends/gpu_order.py" if device == "cuda" else ""
    return f"Chosen automatically on {device}: {shown} (128 maps of 56 x 56 x 96{table})"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .._version import __version__

    return {
        "focalnet": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _triton(),
    }


def _triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "not installed"
        return f"installed, but does not import: {error}"
    # A build for another machine may raise any exception.
    except Exception as error:
        return f"installed, but does not import: {error}"


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "cpu": _cpu_name(),
        "instruction sets": _instruction_sets(),
        "CPU kernels": _cpu_kernels(),
        "L2 cache": _l2_cache(),
        "threads": _threads(),
        "gpu": _gpus(),
    }


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _cpu_name() -> str:
    try:
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, StopIteration, subprocess.SubprocessError):
        pass  # ARM's cpuinfo has no model name, and a container may hide it.
    return platform.processor() or platform.machine()


def _instruction_sets() -> str:
    import torch

    from ..backends.extension import cpu_capabilities

    present = [name for name, there in cpu_capabilities().items() if there]
    used_by_torch = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    return f"{', '.join(present)} ({used_by_torch})" if present else used_by_torch


def _threads() -> str:
    """Threads of torch and of the CPU kernels in inference, beside what the process may use."""
    import torch

    from ..backends import extension, quota

    processors = quota.processors()
    allowed = "no quota" if processors is None else f"a quota of {processors:g}"
    own = [] if extension.missing() else [f"{torch.ops.focalnet.cpu_threads()} by CPU kernels in inference"]
    used = ", ".join([f"{torch.get_num_threads()} used by torch", *own])
    return f"{used}; {os.cpu_count()} processors on the machine, {allowed}"


def _cpu_kernels() -> str:
    """The instruction set that the CPU kernels use, and why it is not AMX."""
    import torch

    from ..backends import extension

    if extension.missing() is not None:
        return ""
    operators = torch.ops.focalnet
    why_not_amx = operators.cpu_why_not_amx()
    return f"{operators.cpu_isa()}; amx: {why_not_amx or 'can run'}"


def _l2_cache() -> str:
    """The size that bounds the scratch of the CPU kernels."""
    import torch

    from ..backends import extension

    return "" if extension.missing() else f"{torch.ops.focalnet.cpu_l2_bytes() // 1024} KB a core"


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        return [f"none: torch, built for {built_for}, finds no device" if built_for else "none: a CPU build of torch"]
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda or torch.version.hip}"
        )
    return gpus


def _extension() -> dict[str, Any]:
    from ..backends import extension

    reason = extension.missing()
    return {"loaded": reason is None, "reason": reason, **extension.build_info()}


def _facts(title: str, facts: dict[str, Any]) -> Table:
    """A table of names and values, without empty values."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", title=title, title_justify="left", title_style="bold", show_header=False, expand=False)
    for name, value in facts.items():
        if value not in (None, "", [], ()):
            table.add_row(name.replace("_", " "), Text(_in_words(value), overflow="fold"))
    return table


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return str(value)


def _backend_table(reasons: dict[str, str | None], extension_reason: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "runs here", "why not", title="backends", title_justify="left", title_style="bold")
    for name, reason in reasons.items():
        verdict = Text("no", style="red") if reason else Text("yes", style="green")
        # The reason is long and already shown above.
        why_not = "the compiled extension is missing: see above" if reason == extension_reason else reason
        table.add_row(name, verdict, Text((why_not or "") if reason else "", overflow="fold"))
    return table

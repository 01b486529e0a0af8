"""Runs a script or a module as Python would, up to its first CUDA call, on a machine without a GPU.

    python bench/gpu/dry.py bench/gpu/gpu_kernels.py --variant tiny_lrf
    python bench/gpu/dry.py -m focalnet.cli info
    python bench/gpu/dry.py --each RUNS.json

torch says that there is a GPU; whatever would start it ends the run, with the line that asked. So an import that
fails, an option that is gone or a name that is misspelt is found here, not in the first minutes on a GPU.

RUNS.json is a list of {"arguments", "log", "limit_s"}. Each run is a fork of a process that has imported what others
have written, which takes longer than the runs themselves; "status" is added, None for a run beyond its limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]
# What most runs import of others, besides torch.
OTHERS = ("triton", "transformers.models.focalnet.modeling_focalnet")
# Besides torch.cuda._lazy_init, which almost every call passes: these go straight to the driver.
DIRECT = ("set_device", "device", "Event", "Stream", "CUDAGraph")


class FirstCudaCall(BaseException):
    """No Exception: code that copes with failing calls must not cope with this one."""


def main(arguments: Sequence[str]) -> int:
    """0 where the run came as far as CUDA or ended well; else what the script ended with."""
    pretend()
    return each(Path(arguments[1])) if arguments[0] == "--each" else run(arguments)


def pretend() -> None:
    """Let torch say that there is a GPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda._lazy_init = _reached
    for name in DIRECT:
        setattr(torch.cuda, name, _stand_in(getattr(torch.cuda, name)))


def run(arguments: Sequence[str]) -> int:
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    sys.path[0] = str(Path.cwd() if is_module else Path(arguments[0]).resolve().parent)
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(arguments[0]).resolve()), run_name="__main__")
    except FirstCudaCall as reached:
        print(f"reached the first CUDA call, {_place(reached)}")
        return 0
    print("ended without a CUDA call")
    return 0


def each(file: Path) -> int:
    """Run what the file lists, as many at a time as there are processors."""
    runs = json.loads(file.read_text())
    for name in OTHERS if len(runs) > 1 else ():
        with contextlib.suppress(Exception):  # whoever needs it will say so
            importlib.import_module(name)
    waiting, running = list(runs), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            one = waiting.pop(0)
            running[_forked(one)] = one
        child, status = os.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # whatever it has started
        code = os.waitstatus_to_exitcode(status)
        running.pop(child)["status"] = None if code == -signal.SIGALRM else code
    file.write_text(json.dumps(runs))
    return 0


def _forked(one: dict) -> int:
    if child := os.fork():
        return child
    os.setsid()
    signal.alarm(int(one["limit_s"]))
    log = os.open(one["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = run(one["arguments"])
    except SystemExit as ended:
        code = ended.code
        if not isinstance(code, int):  # None is a good end, everything else is what went wrong
            print(code or "")
            code = int(code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stand_in(of: object) -> object:
    """A class stays a class, since annotations name some; each is an object of its own, since dynamo lists them."""
    if isinstance(of, type):
        return type(of.__name__, (), {"__new__": _reached})
    return functools.partial(_reached)


def _reached(*_: object, **__: object) -> NoReturn:
    raise FirstCudaCall


def _place(reached: BaseException) -> str:
    """The last line of this project that was running."""
    ours = [one for one in traceback.extract_tb(reached.__traceback__) if str(ROOT) in one.filename]
    last = next((one for one in reversed(ours) if Path(one.filename).name != "dry.py"), ours[-1])
    return f"{Path(last.filename).relative_to(ROOT)}, line {last.lineno}: {last.line}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

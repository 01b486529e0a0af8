"""Runs a script or a module as Python would, up to its first CUDA call, on a machine without a GPU.

    python bench/gpu/dry.py bench/gpu/gpu_kernels.py --variant tiny_lrf
    python bench/gpu/dry.py -m focalnet.cli info

torch says that there is a GPU; whatever would start it ends the run, with the line that asked. So an import that
fails, an option that is gone or a name that is misspelt is found here, not in the first minutes on a GPU.
"""

from __future__ import annotations

import functools
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]
# Besides torch.cuda._lazy_init, which almost every call passes: these go straight to the driver.
DIRECT = ("set_device", "device", "Event", "Stream", "CUDAGraph")


class FirstCudaCall(BaseException):
    """No Exception: code that copes with failing calls must not cope with this one."""


def main() -> int:
    """0 where the run came as far as CUDA or ended well; else what the script ended with."""
    torch.cuda.is_available = lambda: True
    torch.cuda._lazy_init = _reached
    for name in DIRECT:
        setattr(torch.cuda, name, _stand_in(getattr(torch.cuda, name)))
    arguments = sys.argv[1:]
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
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
    sys.exit(main())

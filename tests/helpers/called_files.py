"""Lists the Python files of the package that one call of a block passes through, in the order of first use.

python tests/helpers/called_files.py        updates the lists in docs/architecture.md
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

import focalnet
from focalnet.models.layers import FocalNetLayer

PACKAGE = Path(focalnet.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def called_files(call: Callable[[], object]) -> list[str]:
    # Only code objects are recorded, because that is cheap: an interpreted kernel makes very many calls.
    codes = {}

    def note(frame, event, argument):
        codes[frame.f_code] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = [Path(code.co_filename) for code in codes]
    files = [path.relative_to(PACKAGE).as_posix() for path in paths if path.is_relative_to(PACKAGE)]
    return [file for file in dict.fromkeys(files) if not file.startswith("kernels/")]


def block() -> FocalNetLayer:
    config = focalnet.FocalNetConfig(embed_dim=16, depths=[1], focal_levels=[1], focal_windows=[3])
    return FocalNetLayer(config, stage=0, drop_path=0.1)


def inference() -> list[str]:
    layer, x = block().eval(), torch.randn(1, 4, 4, 16)
    with torch.inference_mode():
        layer(x)
        return called_files(lambda: layer(x))


def training() -> list[str]:
    layer, x = block().train(), torch.randn(1, 4, 4, 16, requires_grad=True)
    with focalnet.use_backend("triton"):
        layer(x).sum().backward()  # makes the plans and caches the gate's answer
        return called_files(lambda: layer(x).sum().backward())


def training_in_another_process() -> list[str]:
    """`training` in a new process, because Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FOCALNET_BACKEND": ""}
    command = [sys.executable, __file__, "--training"]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def filled(text: str) -> str:
    """``text`` with both lists updated."""
    for name, files in {"inference": inference(), "training": training_in_another_process()}.items():
        lines = textwrap.fill(" -> ".join(files), 100, break_long_words=False, break_on_hyphens=False)
        shown = f"{len(files)} files:\n\n```text\n{lines}\n```\n"
        marked = rf"(<!-- called files: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marked, lambda match, shown=shown: match[1] + shown + match[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--training"]:
        print("\n".join(training()))
    else:
        PAGE.write_text(filled(PAGE.read_text()))

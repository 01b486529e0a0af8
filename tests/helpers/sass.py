"""Machine code of a CUDA source, without a GPU: nvcc compiles, cuobjdump disassembles, the instructions of loops are
counted."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from nvcc import code


def cuobjdump():
    """The path of cuobjdump, of the CUDA toolkit or of the triton package; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    found = spec and spec.origin and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found and found.exists() else None


def compiled(source, architecture):
    """(path of the cubin, what ptxas reports) of a CUDA source."""
    folder = code(source, architecture)
    return folder / "code.cubin", (folder / "ptxas.txt").read_text()


def instructions(binary, kernel):
    """[(address, instruction)] of the one kernel whose mangled name contains ``kernel``."""
    listing = subprocess.run([cuobjdump(), "-sass", str(binary)], check=True, capture_output=True, text=True).stdout
    (body,) = (part for part in listing.split("Function : ")[1:] if kernel in part.split("\n", 1)[0])
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", body)
    return [(int(address, 16), line) for address, line in found]


def _count(code, span, without=()):
    """Instructions by name between two addresses, except in the spans ``without``."""
    return Counter(
        re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]
        for address, line in code
        if span[0] <= address <= span[1] and not any(first <= address <= last for first, last in without)
    )


def product_loops(code):
    """[(innermost loop, loop around it)] of each innermost loop with products of matrices, as instructions by name."""
    branches = ((address, re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", line)) for address, line in code)
    spans = {(int(target[1], 16), address) for address, target in branches if target and int(target[1], 16) < address}
    # A jump back from code behind the kernel's end crosses the loops that it returns to.
    spans = {span for span in spans if not any(o[0] < span[0] <= o[1] < span[1] for o in spans)}

    def around(span):
        return [other for other in spans if other != span and other[0] <= span[0] and span[1] <= other[1]]

    innermost = [span for span in spans if not any(span in around(other) for other in spans)]
    pairs = []
    for span in sorted(innermost):
        if _count(code, span)["HMMA"]:
            outer = min(around(span), key=lambda other: other[1] - other[0])
            pairs.append((_count(code, span), _count(code, outer, [span])))
    return pairs

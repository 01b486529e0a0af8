"""The Triton IR of a launch as a digest that names, places and the order of constants do not change.

Everything the compiler does after this IR depends on it, the options and the architecture alone. So two sources with
the same digest become the same machine code, and a report need not compile again what was only cut into other
functions, renamed or commented. Lowering takes a second where compiling takes up to minutes.
"""

from __future__ import annotations

import hashlib
import itertools
import re

from compiled import target_of
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend


class _Stop(Exception):
    """Carries the IR out of Triton's own path, before it compiles."""


def digest(kernel, arguments: dict, options: dict, arch: int) -> str:
    """Of ``kernel[grid](**arguments, **options)`` on ``arch``; arguments as for `compiled.compile_launch`."""
    with target_of(arch):
        kernel.device_caches[arch]  # makes the binder, which would otherwise set `compile` anew
        kept, kernel.compile = kernel.compile, _stop
        try:
            kernel.warmup(**arguments, **options, grid=(1,))
        except _Stop as stop:
            text = normal(stop.args[0])
        finally:
            kernel.compile = kept
    return hashlib.sha256(f"{text}{sorted(options.items())}".encode()).hexdigest()[:16]


def _stop(source, target, options) -> None:
    backend = make_backend(target)
    options = backend.parse_options(dict(options, **source.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    raise _Stop(str(stages["ttir"](made, {})))


def normal(ttir: str) -> str:
    """Without places; constants stand where they are used; values are numbered in the order of their definition."""
    text = re.sub(r"^#loc.*\n", "", ttir, flags=re.MULTILINE)
    text = re.sub(r" ?loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", text)
    constants = dict(re.findall(r"^\s*(%[\w$.-]+) = arith\.constant (.*)\n", text, re.MULTILINE))
    text = re.sub(r"^\s*%[\w$.-]+ = arith\.constant .*\n", "", text, flags=re.MULTILINE)
    numbers: dict[str, str] = {}
    count = itertools.count()

    def number(found: re.Match) -> str:
        value, defines = found.groups()
        if value in constants:
            return constants[value]
        # Regions that lie beside one another use the same names: each definition is a new value.
        if defines is not None or value not in numbers:
            numbers[value] = f"%{next(count)}"
        return numbers[value]

    # Results, `%a, %b = ` or `%a:2 = `; arguments of regions, `%a = ` and `%a: `.
    results = re.compile(r"^(\s*)((?:%[\w$.-]+, )+)", re.MULTILINE)
    text = results.sub(lambda found: found.group(1) + found.group(2).replace(", ", " = , "), text)
    return re.sub(r"(%[\w$.-]+)(?=((?::\d+)? = |: ))?", number, text)

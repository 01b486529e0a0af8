"""Loads the compiled CPU operators, and switches between the instruction sets that run here.

FOCALNET_CPU_LIBRARY names a library of the kernels alone that was not built by setup.py (see asan_cpu.sh). It replaces
the package's extension, because both register the same operators.
"""

import contextlib
import os
import sys
import types

import pytest
import torch

LIBRARY = os.environ.get("FOCALNET_CPU_LIBRARY")
if LIBRARY:
    torch.ops.load_library(LIBRARY)
    stand_in = types.ModuleType("focalnet._C")
    stand_in.Structure = None  # without it the gate asks anew in every call
    sys.modules["focalnet._C"] = stand_in
else:
    from focalnet.backends import extension  # noqa: F401  (loads the extension, which registers the operators)

OPS = torch.ops.focalnet


def require(operator):
    """Skip the test module where the operator was not compiled."""
    if not hasattr(OPS, operator):
        pytest.skip("the extension was built without the CPU kernels", allow_module_level=True)


ISAS = ("plain", "avx2", "avx512", "neon")
# The instruction sets for products of bfloat16. In float32, avx512_bf16 and amx equal avx512, the emulated ones plain.
EMULATED_ISAS = ("emulated", "amx_emulated")
PRODUCT_ISAS = (*ISAS, "avx512_bf16", "amx", *EMULATED_ISAS)


def available_isas(names=ISAS):
    if not hasattr(OPS, "cpu_isa"):
        return []
    before = OPS.cpu_isa()
    found = []
    for name in names:
        with contextlib.suppress(RuntimeError):
            OPS.cpu_set_isa(name)
            found.append(name)
    OPS.cpu_set_isa(before)
    return found


@pytest.fixture(params=available_isas())
def isa(request):
    before = OPS.cpu_set_isa(request.param)
    yield request.param
    OPS.cpu_set_isa(before)


@pytest.fixture(params=available_isas(PRODUCT_ISAS))
def product_isa(request):
    before = OPS.cpu_set_isa(request.param)
    yield request.param
    OPS.cpu_set_isa(before)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)

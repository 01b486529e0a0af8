"""Products on AMX. Their instructions are emulated here, so that the kernels' logic is tested on any processor.

tests/cpu/test_cpu_block_bfloat16.py and test_own_threads.py run blocks and heads through the same emulation.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import OPS, require
from torch.nn import functional as F

require("cpu_why_not_amx")

KERNELS = Path(__file__).parents[2] / "csrc" / "cpu"
FLAGS = "-std=c++20 -O1 -ffp-contract=off -Wno-psabi -mamx-tile -mamx-bf16"
CPUINFO = Path("/proc/cpuinfo")
on_x86_linux = pytest.mark.skipif(
    "x86-64 Linux only" in OPS.cpu_why_not_amx() or "without AMX" in OPS.cpu_why_not_amx(),
    reason=f"the kernels are not compiled here: {OPS.cpu_why_not_amx()}",
)


@pytest.fixture
def emulated():
    before = OPS.cpu_set_isa("amx_emulated")
    yield
    OPS.cpu_set_isa(before)


def product(x, weight, bias):
    """x (rows, K), weight (N, K): through the patch embedding of 1 x 1 patches, which takes any size."""
    rows = x.shape[0]
    arguments = (x[None, :, None], weight[:, :, None, None], bias, [1, 1], [0, 0], [rows, 1], None, None, None)
    return OPS.cpu_patch_embed(*arguments)[0, :, 0]


def operands(rows, columns, K):
    generator = torch.Generator().manual_seed(K)
    return [
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((rows, K), (columns, K), (columns,))  # x, weight, bias
    ]


@pytest.mark.parametrize("K", [1, 2, 31, 32, 33, 96, 147, 1024, 1030, 2500])
@pytest.mark.parametrize("rows, columns", [(1, 1), (13, 17), (16, 16), (17, 32), (33, 64), (66, 48), (130, 33)])
def test_products_keep_the_rule(emulated, rows, columns, K):
    """Tiles of one or two times sixteen rows and columns, k that fills no tile, several k blocks."""
    x, weight, bias = operands(rows, columns, K)
    exact = x.double() @ weight.double().T + bias.double()
    allowed = 2 * (F.linear(x, weight, bias).double() - exact).abs().max() + exact.abs().max() * 2**-8
    assert (product(x, weight, bias).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("rows", range(1, 50))
def test_a_row_has_the_same_bits_wherever_its_tile_starts(emulated, rows):
    """Tiles of fewer than sixteen rows start above their first row, or have fewer rows."""
    x, weight, bias = operands(50, 24, 70)
    assert torch.equal(product(x[:rows], weight, bias), product(x, weight, bias)[:rows])


def test_what_lies_behind_the_last_k_is_not_read(emulated):
    """Infinities in the scratch memory of an earlier call would make NaN of the zeros that fill the tile."""
    x, weight, bias = operands(20, 24, 40)
    expected = product(x, weight, bias)
    infinite = torch.full((24, 64), float("inf")).bfloat16()
    product(infinite[:20], infinite, bias)
    assert torch.equal(product(x, weight, bias), expected)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the program says for 16 and for 5 rows: why there is no AMX, and the differences of each kind."""
    program = tmp_path_factory.mktemp("amx") / "amx"
    sources = [str(Path(__file__).with_name("amx_program.cpp")), str(KERNELS / "amx.cpp")]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *FLAGS.split(), f"-I{KERNELS}", *sources, "-o", str(program)], check=True)
    run = [subprocess.run([program, rows], capture_output=True, text=True, check=True).stdout for rows in ("16", "5")]
    return [text.splitlines() for text in run]


@on_x86_linux
def test_the_emulation_is_the_instruction_as_intel_defines_it(printed):
    """Denormals, infinities and NaN included."""
    for _, *lines in printed:
        assert len(lines) == 5 and all(line.split()[-2] == "0" for line in lines), lines


@on_x86_linux
def test_the_emulation_gives_the_bits_of_the_instruction(printed):
    for why_not, *lines in printed:
        if why_not:
            pytest.skip(f"not run on AMX: {why_not}")
        assert all(line.split()[-1] == "0" for line in lines), lines


@on_x86_linux
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
def test_the_compiled_loop_is_of_tile_instructions(printed):
    """In the loop over k four products take four loads, prefetches are a call, and nothing else touches memory."""
    library = sys.modules["focalnet._C"].__file__
    command = ["objdump", "-d", "--no-show-raw-insn", "-M", "att", library]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ldtilecfg" in code and "tilerelease" in code and "tilestored" in code
    loops = [loop for loop in loops_of(code) if sum("tdpbf16ps" in line for line in loop) == 4]
    assert loops, f"{code.count('tdpbf16ps')} products, none in a loop of four"
    for loop in loops:
        touching = [line for line in loop if "(" in line and not line.startswith(("lea", "tileload", "nop"))]
        assert sum(line.startswith("tileload") for line in loop) == 4 and not touching, loop
        assert sum("prefetch_beside_step" in line for line in loop) == 1, loop


def loops_of(code):
    """The instructions of every innermost backward jump within 60 instructions that has a tile product."""
    listed = [(int(at, 16), text.strip()) for at, text in re.findall(r"^\s+([0-9a-f]+):\t(.+)$", code, re.M)]
    index = {at: i for i, (at, _) in enumerate(listed)}
    for i, (_, text) in enumerate(listed):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        start = index.get(int(jump[1], 16)) if jump else None
        if start is not None and 0 < i - start < 60:
            body = [line for _, line in listed[start:i]]
            if any("tdpbf16ps" in line for line in body) and not any(line.startswith("ret") for line in body):
                yield body


@pytest.mark.skipif(not CPUINFO.exists(), reason="compares with /proc/cpuinfo, which only Linux has")
def test_it_is_used_where_the_processor_has_it_and_otherwise_says_why_not():
    reason, there = OPS.cpu_why_not_amx(), re.search(r"\bamx_bf16\b", CPUINFO.read_text())
    if not reason:
        assert there and torch.ops.focalnet.cpu_isa() in ("amx", os.environ.get("FOCALNET_CPU_ISA"))
        return
    assert there is None or "grant" in reason or "without AMX" in reason
    with pytest.raises(RuntimeError, match="isa amx does not run on this processor"):
        OPS.cpu_set_isa("amx")

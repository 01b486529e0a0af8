"""What nvcc makes of the kernels on tensor cores, without a GPU: no spills, and instructions an output that stay few.

A lane has four outputs in a block of eight columns and sixteen rows. The loop over the rows of a kernel is run once a
row of it, the loop around it once a tile. Everything in the outer loop counts, also what only the last level or the
others run, so the figures are upper limits.
"""

import re
import shutil

import pytest
import sass
from cuda_program import CUDA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]

ARCHITECTURES = (80, 90, 100)
# 512 threads of a block; two blocks of 256, or one.
MAX_REGISTERS = {
    "toeplitz_fwd": 128,
    "toeplitz_fwd_planes": 255,
    "toeplitz_bwd": 128,
    "toeplitz_bwd_levels": 128,
    "toeplitz_turn": 64,
}
OUTPUTS = 4  # a lane and block of columns
BLOCKS = 7  # 56 columns
KERNELS = (3, 5, 7)
# An output, three levels with GELU, gates and sums, bfloat16; 285 and more with multiply-adds.
MAX_INSTRUCTIONS = 102
# The same of backward's tiles: three levels up and down, with the derivative of GELU and dweights. Passes over
# positions (GELU, dgates, agg, loads and stores) come on top.
MAX_BACKWARD_INSTRUCTIONS = 222
MAX_PLANES_INSTRUCTIONS = 35  # with the sum of gates in registers


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sass")
    kept = {}

    def get(name, architecture):
        if (name, architecture) not in kept:
            kept[name, architecture] = sass.compiled(CUDA / f"{name}.cu", architecture, folder)
        return kept[name, architecture]

    return get


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", MAX_REGISTERS)
def test_nothing_spills(compiled, name, architecture):
    _, report = compiled(name, architecture)
    kernels = report.split("Compiling entry function ")[1:]
    assert kernels
    for kernel in kernels:
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", kernel), kernel
        assert int(re.search(r"Used (\d+) registers", kernel)[1]) <= MAX_REGISTERS[name], kernel


@pytest.fixture(scope="module")
def loops(compiled):
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the triton package")
    binary, _ = compiled("toeplitz_fwd", 90)
    code = sass.instructions(binary, f"toeplitz_fwd_kernelI13__nv_bfloat16Li{BLOCKS}E")
    return {inner["HMMA"] // BLOCKS // 2: (inner, outer) for inner, outer in sass.product_loops(code)}


def test_a_row_of_the_kernel_is_two_half_products_a_block_of_columns_and_step(loops):
    """Neighbouring blocks share fragments: four ldmatrix of four matrices serve seven blocks, not seven. Nothing is
    copied: 26 instructions in all, with seven whole products they are 33."""
    assert loops.keys() == {1, 2}
    for steps, (inner, _) in loops.items():
        assert inner["HMMA"] == 2 * BLOCKS * steps
        assert sum(inner.values()) <= 26 + 17 * (steps - 1)
        assert inner["LDSM"] == (BLOCKS + 2 * steps) // 2
        assert inner["LDS"] == 2 * steps


def test_instructions_an_output(loops):
    inner, outer = (sum(part.values()) for part in loops[1])
    per_output = sum(outer + kernel * inner for kernel in KERNELS) / (OUTPUTS * BLOCKS)
    assert per_output <= MAX_INSTRUCTIONS


@pytest.fixture(scope="module")
def backward_loops(compiled):
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the triton package")
    binary, _ = compiled("toeplitz_bwd", 90)
    return sass.product_loops(sass.instructions(binary, f"toeplitz_bwd_kernelI13__nv_bfloat16Li{BLOCKS}E"))


def correlation(loops):
    (product,) = (inner for inner, _ in loops if inner["LDS"] > 4)
    return product


def test_dweights_take_rows_of_dz_together(backward_loops):
    """A trip of the loop takes 56 columns of one, two or four rows of dz: a product for sixteen columns, and as many
    again where the kernel has more rows than eight allow."""
    product = correlation(backward_loops)
    assert product["HMMA"] == 2 * (BLOCKS + 1) // 2
    assert product["LDSM"] == 2 * (BLOCKS + 1) // 4
    assert product["LDS"] <= 2 * (BLOCKS + 1)
    assert sum(product.values()) <= 48


def test_instructions_an_output_of_backward(backward_loops):
    product = sum(correlation(backward_loops).values())
    # One step of sixteen columns; up, down, and down to dctx.
    tiles = [pair for pair in backward_loops if pair[0]["HMMA"] == 2 * BLOCKS]
    assert len(tiles) == 3
    up, down, dctx = (tuple(sum(part.values()) for part in pair) for pair in tiles)
    trips = {3: 4, 5: 8, 7: 8}  # of a tile's sixteen rows of dz
    total = sum(up[1] + kernel * (up[0] + down[0]) + trips[kernel] * product for kernel in KERNELS)
    total += (len(KERNELS) - 1) * down[1] + dctx[1]
    assert total / (OUTPUTS * BLOCKS) <= MAX_BACKWARD_INSTRUCTIONS


def test_instructions_an_output_of_small_maps(compiled):
    """56 x 56: all four tiles of a plane are one pass through the code, once for the last level and once for the
    others. The loop inside takes two rows of the kernel; the first and the last three are outside of it."""
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the triton package")
    binary, _ = compiled("toeplitz_fwd_planes", 90)
    code = sass.instructions(binary, f"toeplitz_fwd_planes_kernelI13__nv_bfloat16Li{BLOCKS}ELi16E")
    inner, level = min(sass.product_loops(code), key=lambda pair: sum(pair[1].values()))
    assert inner["HMMA"] == 2 * 4 * (2 * BLOCKS - (BLOCKS + 1) // 2)
    assert inner["LDSM"] == 2 * (BLOCKS + 1) // 2
    rows = sum(inner.values()) / 2
    per_output = sum(sum(level.values()) + (kernel - 3) * rows for kernel in KERNELS) / (7 * 2 * BLOCKS)
    assert per_output <= MAX_PLANES_INSTRUCTIONS

"""What nvcc makes of the kernels on tensor cores, without a GPU: instructions an output that stay few.

A lane has four outputs in a block of eight columns and sixteen rows. The loop over the rows of a kernel is run once a
row of it, the loop around it once a tile. Everything in the outer loop counts, also what only the last level or the
others run, so the figures are upper limits.
"""

import shutil

import pytest
import sass
from cuda_program import CUDA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]

OUTPUTS = 4  # a lane and block of columns
BLOCKS = 7  # 56 columns
KERNELS = (3, 5, 7)
# An output, three levels with GELU, gates and sums, bfloat16; 285 and more with multiply-adds.
MAX_INSTRUCTIONS = 102
# The same of backward's tiles: three levels up and down, with the derivative of GELU and dweights. Passes over
# positions (GELU, dgates, agg, loads and stores) come on top.
MAX_BACKWARD_INSTRUCTIONS = 222
MAX_PLANES_INSTRUCTIONS = 35  # with the sum of gates in registers


def compiled(name, architecture):
    return sass.compiled(CUDA / f"{name}.cu", architecture)


@pytest.fixture(scope="module")
def loops():
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
def backward_loops():
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the triton package")
    binary, _ = compiled("toeplitz_bwd", 90)
    return sass.product_loops(sass.instructions(binary, f"toeplitz_bwd_kernelI13__nv_bfloat16Li{BLOCKS}E"))


def correlations(loops):
    """{kernel rows at once: instructions of a tile}, where one step of columns does: no taps are read."""
    found = {}
    for inner, _ in loops:
        rows, left = divmod(inner["HMMA"], BLOCKS)
        if inner["LDS"] == 0 and left == 0 and inner["LDSM"] == (rows + 1) * (BLOCKS + 1) // 2:
            found[rows] = inner
    return found


def test_dweights_share_fragments_of_dz_between_kernel_rows(backward_loops):
    """A row of the kernel is a product for every eight columns, with four ldmatrix and moves; dz is read once for all
    rows, and nothing is copied in shared memory."""
    found = correlations(backward_loops)
    assert found.keys() == {1, 3, 4}
    for rows, counted in found.items():
        assert counted["STS"] == 0
        assert sum(counted.values()) <= 28 * rows + 100


def test_instructions_an_output_of_backward(backward_loops):
    # One step of sixteen columns; up, and the larger of the two ways down forms dz, the other dctx.
    convolutions = [pair for pair in backward_loops if pair[0]["HMMA"] == 2 * BLOCKS and pair[0]["LDS"] > 0]
    tiles = [tuple(sum(part.values()) for part in pair) for pair in convolutions]
    assert len(tiles) == 3
    up, (dctx, down) = tiles[0], sorted(tiles[1:], key=lambda tile: tile[1])
    of_rows = {rows: sum(counted.values()) for rows, counted in correlations(backward_loops).items()}
    products = {3: of_rows[3], 5: of_rows[4] + of_rows[1], 7: of_rows[3] + of_rows[4]}
    total = sum(up[1] + kernel * (up[0] + down[0]) + products[kernel] for kernel in KERNELS)
    total += (len(KERNELS) - 1) * down[1] + dctx[1]
    assert total / (OUTPUTS * BLOCKS) <= MAX_BACKWARD_INSTRUCTIONS


def test_instructions_an_output_of_small_maps():
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

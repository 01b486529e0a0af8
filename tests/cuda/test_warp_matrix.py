"""The CPU's ldmatrix and mma (cuda_on_cpu/warp_matrix.h) against plain matrix products.

The operands are small whole numbers, so every product and sum is exact and a result is right or wrong. A fragment that
is laid out otherwise than the PTX ISA says gives another product.
"""

import shutil

import pytest
import torch
from cuda_program import TESTS, case, linked, raw, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer")

SOURCE = TESTS / "cuda" / "cuda_on_cpu" / "warp_product.cpp"
M, N, K = 16, 8, 16


@pytest.fixture(scope="module")
def program():
    return linked([SOURCE])


def stored(matrix, pitch, dtype):
    """Sixteen rows of ``pitch`` elements that begin with the matrix."""
    rows = torch.zeros(16, pitch, dtype=dtype)
    rows[: matrix.shape[0], : matrix.shape[1]] = matrix
    return raw(rows)


def product(program, folder, a, b, dtype, transposed=(False, False), pitch=24, offset=0, halves=False):
    """(A @ B, matrices that ldmatrix loaded, passes beyond the first)."""
    a_stored, b_stored = a.T if transposed[0] else a, b if transposed[1] else b.T
    data = case([dtype == torch.float16, *transposed, pitch, offset, halves])
    (folder / "case").write_bytes(data + stored(a_stored, pitch, dtype) + stored(b_stored, pitch, dtype))
    counts = run([program, folder / "case", folder / "result"])
    result = torch.frombuffer(bytearray((folder / "result").read_bytes()), dtype=torch.float32)
    return result.view(M, N), *map(int, counts.split())


def whole_numbers():
    return torch.randint(-8, 9, (M, K)).double(), torch.randint(-8, 9, (K, N)).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [(a, b) for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["m16n8k16", "m16n8k8"])
def test_product(program, tmp_path, dtype, transposed, halves):
    a, b = whole_numbers()
    result, matrices, _ = product(program, tmp_path, a, b, dtype, transposed, halves=halves)
    assert torch.equal(result.double(), a @ b)
    assert matrices == 6


@pytest.mark.parametrize(("pitch", "passes"), [(24, 0), (72, 0), (16, 1), (32, 3), (64, 7)])
def test_bank_conflicts_are_those_of_the_pitch(program, tmp_path, pitch, passes):
    """Rows of 16 bytes lie in quarter (row * pitch / 8) % 8 of the banks; rows that share a quarter take turns."""
    *_, extra = product(program, tmp_path, *whole_numbers(), torch.bfloat16, pitch=pitch)
    assert extra == 6 * passes


def test_a_row_that_is_not_aligned_fails(program, tmp_path):
    with pytest.raises(AssertionError, match="ldmatrix: a row is not aligned to 16 bytes"):
        product(program, tmp_path, *whole_numbers(), torch.bfloat16, offset=8)

"""Products by rows, of csrc/cuda/modulate.cu, compiled for the CPU (cuda_on_cpu/); no GPU is needed.

A product is rounded once, so it has PyTorch's bits. The sum over the rows obeys the project's rule against float64.
"""

import shutil

import pytest
import torch
from cuda_program import CUDA, compile_sources, modulate
from rule import assert_within_rule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_sum = pytest.mark.parametrize("want_sum", [False, True], ids=["product", "product and sum"])

# (rows, C, offset and pitch of q and of the product, multiprocessors)
CASES = {
    "contiguous": (50, 96, 0, 96, 0, 96, 4),
    "part of a padded projection": (50, 96, 96, 208, 0, 208, 4),
    "8 bytes": (50, 96, 4, 196, 0, 96, 4),
    "2 bytes": (50, 96, 0, 195, 1, 195, 4),
    "odd channels": (70, 13, 3, 29, 0, 13, 4),
    "one channel": (600, 1, 0, 5, 2, 3, 1),
    "more vectors than threads": (9, 1001, 0, 1001, 0, 1003, 2),
    "more rows than blocks at once take": (3000, 8, 0, 24, 8, 16, 1),
    "one row for all rows": (40, 16, 0, 0, 0, 16, 4),
    "one row": (1, 24, 0, 24, 0, 24, 132),
    "no rows": (0, 24, 0, 24, 0, 24, 4),
}


def rows_of(rows, channels, offset, pitch, dtype):
    """Positive numbers, so that a sum is no difference of large ones, whose rounding nobody bounds."""
    storage = torch.rand(offset + (rows - 1) * pitch + channels if rows else 0, dtype=torch.float64).to(dtype)
    return storage.as_strided((rows, channels), (pitch, 1), offset if rows else 0)


def operands(case, dtype):
    rows, channels, offset, pitch, out_offset, out_pitch, multiprocessors = CASES[case]
    dout = rows_of(rows, channels, 0, channels, dtype)
    q = rows_of(rows, channels, offset, pitch, dtype)
    return dout, q, rows_of(rows, channels, out_offset, out_pitch, dtype), multiprocessors


def unwritten(storage, out):
    """The elements of a storage beside those of ``out``."""
    written = torch.zeros(storage.shape, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    return storage[~written]


@pytest.mark.parametrize("case", CASES)
@each_dtype
@each_sum
def test_product_and_sum(program, tmp_path, case, dtype, want_sum):
    dout, q, out, multiprocessors = operands(case, dtype)
    storage, total, _ = modulate(program, tmp_path, dout, q, out, want_sum, multiprocessors)
    assert torch.equal(storage.as_strided(out.shape, out.stride(), out.storage_offset()), dout * q)
    assert unwritten(storage, out).isnan().all()
    if want_sum:
        exact = (dout.double() * q.double()).sum(0)
        assert_within_rule("sum", total, (dout * q).sum(0), exact)


@pytest.mark.parametrize("case", ["contiguous", "2 bytes", "odd channels"])
@each_dtype
def test_a_product_replaces_its_factor(program, tmp_path, case, dtype):
    modulator, q, *_ = operands(case, dtype)
    storage, *_ = modulate(program, tmp_path, modulator, q)
    assert torch.equal(storage.view(modulator.shape), modulator * q)


def test_a_sum_does_not_depend_on_the_order_of_threads_and_blocks(program, tmp_path):
    dout, q, out, multiprocessors = operands("part of a padded projection", torch.float32)
    (_, first, _), (_, second, _) = (
        modulate(program, tmp_path, dout, q, out, True, multiprocessors, seed) for seed in (1, 2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("images", [1, 4])
def test_a_product_of_few_images_has_blocks_for_every_multiprocessor(program, tmp_path, images):
    modulator, q = (rows_of(images * 56 * 56, 96, 0, 96, torch.bfloat16) for _ in range(2))
    *_, (launches, blocks) = modulate(program, tmp_path, modulator, q)
    assert launches == 1 and blocks >= 132


def test_a_missing_barrier_is_seen(program, tmp_path):
    line = "        __syncthreads();\n        if (row + half"
    text = (CUDA / "modulate.cu").read_text()
    changed = text.replace(line, line.replace("__syncthreads();", ""))
    assert changed != text
    broken = shutil.copytree(program.parent, tmp_path / "broken")
    (broken / "modulate.cu").write_text(changed)
    program = compile_sources(broken, [broken / "modulate.cu"])
    dout, q, out, multiprocessors = operands("contiguous", torch.float32)
    _, total, _ = modulate(program, tmp_path, dout, q, out, True, multiprocessors)
    assert not torch.allclose(total, (dout * q).sum(0))

"""Products by rows (csrc/cuda/modulate.cu) on the CPU: a product is rounded once, a sum over rows obeys the rule."""

import shutil

import pytest
import torch
from cuda_program import barrier_at, modulate
from cuda_rule import assert_rule, each_dtype

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


each_sum = pytest.mark.parametrize("want_sum", [False, True], ids=["product", "product and sum"])

# (rows, C, offset and pitch of q and of the product, multiprocessors)
ROWS = {
    "contiguous": (50, 96, 0, 96, 0, 96, 4),
    "part of a padded projection": (50, 96, 96, 208, 0, 208, 4),
    "8 bytes": (50, 96, 4, 196, 0, 96, 4),
    "2 bytes": (50, 96, 0, 195, 1, 195, 4),
    "odd channels": (70, 13, 3, 29, 0, 13, 4),
    "one channel": (600, 1, 0, 5, 2, 3, 1),
    "more vectors than threads": (9, 1001, 0, 1001, 0, 1003, 2),
    "more rows than blocks at once take": (3000, 8, 0, 24, 8, 16, 1),
    "more partials than a block has in flight": (600, 252, 1, 259, 0, 252, 132),
    "one row for all rows": (40, 16, 0, 0, 0, 16, 4),
    "one row": (1, 24, 0, 24, 0, 24, 132),
    "no rows": (0, 24, 0, 24, 0, 24, 4),
}


def rows_of(rows, channels, offset, pitch, dtype):
    """Positive numbers, so that a sum is no difference of large ones, whose rounding nobody bounds."""
    storage = torch.rand(offset + (rows - 1) * pitch + channels if rows else 0, dtype=torch.float64).to(dtype)
    return storage.as_strided((rows, channels), (pitch, 1), offset if rows else 0)


def factors(case, dtype):
    rows, channels, offset, pitch, out_offset, out_pitch, multiprocessors = ROWS[case]
    dout = rows_of(rows, channels, 0, channels, dtype)
    q = rows_of(rows, channels, offset, pitch, dtype)
    return dout, q, rows_of(rows, channels, out_offset, out_pitch, dtype), multiprocessors


def unwritten(storage, out):
    """The elements of a storage beside those of ``out``."""
    written = torch.zeros(storage.shape, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    return storage[~written]


@pytest.mark.parametrize("case", ROWS)
@each_dtype
@each_sum
def test_a_product_by_rows_has_pytorchs_bits_and_its_sum_obeys_the_rule(program, tmp_path, case, dtype, want_sum):
    dout, q, out, multiprocessors = factors(case, dtype)
    storage, total, _ = modulate(program, tmp_path, dout, q, out, want_sum, multiprocessors)
    assert torch.equal(storage.as_strided(out.shape, out.stride(), out.storage_offset()), dout * q)
    assert unwritten(storage, out).isnan().all()
    if want_sum:
        exact = (dout.double() * q.double()).sum(0)
        assert_rule("sum", total, (dout * q).sum(0), exact)


@pytest.mark.parametrize("case", ["contiguous", "2 bytes", "odd channels"])
@each_dtype
def test_a_product_replaces_its_factor(program, tmp_path, case, dtype):
    modulator, q, *_ = factors(case, dtype)
    storage, *_ = modulate(program, tmp_path, modulator, q)
    assert torch.equal(storage.view(modulator.shape), modulator * q)


def test_a_sum_does_not_depend_on_the_order_of_threads_and_blocks(program, tmp_path):
    dout, q, out, multiprocessors = factors("part of a padded projection", torch.float32)
    (_, first, _), (_, second, _) = (
        modulate(program, tmp_path, dout, q, out, True, multiprocessors, seed) for seed in (1, 2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("images", [1, 4])
def test_a_product_of_few_images_has_blocks_for_every_multiprocessor(program, tmp_path, images):
    modulator, q = (rows_of(images * 56 * 56, 96, 0, 96, torch.bfloat16) for _ in range(2))
    *_, (launches, blocks) = modulate(program, tmp_path, modulator, q)
    assert launches == 1 and blocks >= 132


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("modulate.cu", "        __syncthreads();\n        if (row + half"),
        ("partial_sums.cu", "    __syncthreads();\n    if (row > 0"),
    ],
    ids=["of rows", "of partials"],
)
def test_a_barrier_that_is_missing_in_a_sum_is_seen(program, tmp_path, source, line):
    dout, q, out, multiprocessors = factors("contiguous", torch.float32)
    missing = barrier_at(source, line)
    _, total, _ = modulate(program, tmp_path, dout, q, out, True, multiprocessors, without=missing)
    assert not torch.allclose(total, (dout * q).sum(0))

"""The emulated dot product of bfloat16 pairs is, to the bit, what processors with AVX512_BF16 compute."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from instruction_sets import OPS, available_isas, require

require("cpu_patch_embed")

needs_instruction = pytest.mark.skipif(
    "avx512_bf16" not in available_isas(("avx512_bf16",)), reason="the processor has no AVX512_BF16"
)
FLAGS = "-std=c++20 -O1 -ffp-contract=off -Wno-psabi -mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx512bf16 -mfma"


@needs_instruction
def test_the_emulated_instruction_gives_the_bits_of_the_real_one(tmp_path):
    """Denormals, infinities and NaN included."""
    source, program = Path(__file__).with_name("dot_program.cpp"), tmp_path / "dots"
    kernels = Path(__file__).parents[2] / "csrc" / "cpu"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *FLAGS.split(), f"-I{kernels}", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert [line.rsplit(": ", 1)[1] for line in printed.splitlines()] == ["0"] * 5, printed


@needs_instruction
@pytest.mark.parametrize("K", [1, 2, 31, 96, 1024, 1030, 2500])
@pytest.mark.parametrize("rows, columns", [(1, 1), (13, 17), (66, 48), (150, 32)])
def test_products_give_the_same_bits(rows, columns, K):
    """Every tile, odd K, several k blocks, panels packed before and while they are used."""
    torch.manual_seed(K)
    x, weight = torch.randn(1, rows, 1, K).bfloat16(), torch.randn(columns, K, 1, 1).bfloat16()
    bias = torch.randn(columns).bfloat16()
    found = []
    before = OPS.cpu_isa()
    for isa in ("avx512_bf16", "emulated"):
        OPS.cpu_set_isa(isa)
        found.append(OPS.cpu_patch_embed(x, weight, bias, [1, 1], [0, 0], [rows, 1], None, None, None))
    OPS.cpu_set_isa(before)
    assert torch.equal(*found)

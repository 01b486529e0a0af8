"""The kernels around residual branches, compiled without a GPU: `bench/static/compile_residual.py` made the rows."""

import pytest
import torch
from all_launches import arguments_of
from bytes_moved import NOWHERE
from compile_report import head_of, source
from compile_residual import FILE, launches
from compiled import compile_launch, resources

from focalnet.benchmark.rows import key, read


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_of_the_published_models_has_a_row_and_none_spills(arch):
    rows = {key(row): row for row in read(FILE, NOWHERE)}
    wanted = [(key(head_of(arch, launch, types)), source(launch)) for launch, types in launches(arch).values()]
    assert len(wanted) > 100
    for head, its_source in wanted:
        assert head in rows, head
        assert rows[head]["source"] == its_source, f"{head} was compiled from another source"
        assert rows[head]["against"] == [] and rows[head]["local"] == 0, head


@pytest.mark.parametrize(
    "kernel, arch",
    [("residual_fwd_kernel", 80), ("residual_norm_bwd_kernel", 90), ("layer_norm_bwd_kernel", 100)],
)
def test_a_kernel_loads_and_stores_sixteen_bytes_at_once_and_does_not_spill(kernel, arch):
    launch, types = next(
        (launch, types)
        for launch, types in launches(arch).values()
        if launch.name == kernel and set(types.values()) <= {torch.bfloat16, torch.float32}
    )
    compiled = compile_launch(launch.kernel, arguments_of(launch, types), launch.options, arch)
    assert resources(compiled, arch).why_not() is None
    assert "ld.global.v4.b32" in compiled.asm["ptx"] and "st.global.v4.b32" in compiled.asm["ptx"]

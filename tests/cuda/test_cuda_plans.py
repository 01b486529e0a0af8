"""How launches of csrc/cuda cut the maps: they fit the device, and the stages of published models go the short way."""

import shutil

import pytest
import torch
from cuda_program import SM_80, SM_86, SM_90, grids, plan
from cuda_rule import ONE, SIXTEEN, each_dtype
from operands import Shape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with AddressSanitizer"),
]


@pytest.mark.parametrize(
    ("device", "shape", "channels"),
    [
        *[(ONE, shape, 16) for shape in SIXTEEN],
        (SM_90, Shape(128, 56, 56, 96, (3, 5, 7)), 16),
        (SM_80, Shape(128, 56, 56, 96, (3, 5, 7)), 8),
        (SM_86, Shape(1, 28, 28, 96, (3, 5, 7)), 8),
        (ONE, Shape(5, 28, 28, 15, (3, 5, 7)), 8),
    ],
    ids=str,
)
def test_planes_have_sixteen_channels_where_they_fit_and_fill_the_device(program, tmp_path, device, shape, channels):
    path, _, (forward, *_rest) = plan(program, tmp_path, shape, torch.bfloat16, device, True)
    # Wide maps leave a warp no registers for company: eight take two channels each.
    warps = 8 if shape.width > 16 else channels
    assert (path, forward.block_c, forward.threads) == ("planes", channels, 32 * warps)


# The stages of the published variants at their image sizes, and detection maps.
STAGES = [
    Shape(batch, size // scale, size // scale, width * scale // 4, kernels)
    for batch in (1, 128)
    for size, width, kernels in [
        (224, 96, (3, 5, 7)),
        (224, 128, (3, 5)),
        (384, 192, (5, 7, 9)),
        (384, 192, (3, 5, 7, 9)),
    ]
    for scale in (4, 8, 16, 32)
] + [Shape(2, 200, 334, 96, kernels) for kernels in [(9, 11), (9, 11, 13), (11, 13, 15)]]


@pytest.mark.parametrize("device", [SM_80, SM_86, SM_90], ids=["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("tensor_cores", [False, True], ids=["multiply-adds", "tensor cores"])
@each_dtype
def test_every_launch_fits_the_device(program, tmp_path, device, dtype, tensor_cores):
    """So do the largest kernels that are taken, at any number of levels."""
    if tensor_cores and dtype == torch.float32:
        return
    largest = [(31,), (31,) * 8] if not tensor_cores else [(15,) * 3, (7,) * 8, ((1, 15), (13, 1), 15, (15, 13))]
    extremes = [Shape(1, height, width, 64, k) for k in largest for height, width in [(300, 300), (1, 999), (999, 1)]]
    for shape in [*STAGES, *extremes, Shape(1, 1, 1, 1, largest[-1])]:
        *_, cuts = plan(program, tmp_path, shape, dtype, device, tensor_cores)
        for cut in cuts:
            assert cut.fits and cut.shared_bytes <= 1024 * device.shared_per_block, (shape, cut)


def test_the_stages_of_the_tiny_model_are_taken_as_whole_maps_on_hopper(program, tmp_path):
    """Each block then reads ctx once and writes agg once, and the global level needs no second pass."""
    for stage in STAGES:
        if stage.batch == 128 and stage.kernels == (3, 5, 7):
            forward, backward, _ = plan(program, tmp_path, stage, torch.bfloat16, SM_90)
            assert forward == "whole map"
            assert backward == ("levels" if stage.height == 56 else "whole map")


@pytest.mark.parametrize(("stage", "launches"), [*enumerate([5, 3, 3, 3])], ids=str)
def test_the_partials_of_all_levels_are_summed_in_one_launch(program, tmp_path, stage, launches):
    """Backward of the tiny model is one launch, the first stage's with a turn before and behind, and two sums: of
    dgates, and of all levels' dweights. Each of them has two blocks for every multiprocessor."""
    shape = Shape(128, 56 >> stage, 56 >> stage, 96 << stage, (3, 5, 7))
    found = grids(program, tmp_path, shape, torch.bfloat16, SM_90, True)
    assert len(found) == launches
    assert min(found) >= 2 * SM_90.multiprocessors

"""Every processor has work: programs of the level kernels, from the plans alone."""

import importlib.util
import math

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("focalnet.kernels needs triton", allow_module_level=True)

from all_launches import DETECTION, DETECTORS
from bytes_moved import case_of, plan_of
from focalnet.kernels.level_launch import level_config_of
from focalnet.kernels.plan import H100

from focalnet.benchmark.floors import stages
from focalnet.variants import VARIANTS

PUBLISHED = [stage for name in VARIANTS for stage in stages(name)]
DETECTED = [stage for name, window in DETECTORS for stage in stages(name, DETECTION, window)]


def level_launch(operator, stage, batch):
    """The launch of the levels, and the number of blocks of channels."""
    case = case_of(operator, stage, batch, torch.bfloat16)
    launch = next(one for one in plan_of(operator, case).launches if one.name.startswith("gated_aggregation"))
    return launch, math.ceil(stage.channels / level_config_of(case, H100).block_c)


@pytest.mark.parametrize("operator", ["gated_aggregation", "gated_aggregation_bwd"])
def test_at_batch_128_two_programs_are_resident_on_every_processor(operator):
    """Where the blocks of channels do not divide their number, those of one more image would take a second wave."""
    for stage in PUBLISHED:
        launch, blocks = level_launch(operator, stage, 128)
        assert 2 * H100.sm_count - blocks < math.prod(launch.grid) <= 2 * H100.sm_count, stage


@pytest.mark.parametrize("batch", [1, 8])
def test_few_images_make_one_wave_or_as_many_programs_as_they_can_be_cut_into(batch):
    """Into bands as high as a tile, and into blocks of 16 channels, 32 where there are four levels.

    A tile has at least two warps, since one would spill. Planes of at most 16 rows have no bands.
    """
    for stage in PUBLISHED + (DETECTED if batch == 1 else []):
        launch, blocks = level_launch("gated_aggregation", stage, batch)
        config = level_config_of(case_of("gated_aggregation", stage, batch, torch.bfloat16), H100)
        bands = 1 if stage.height <= 16 else stage.height // config.rows
        width = max(32 if len(stage.kernels) == 4 else 16, 256 // config.block_w)
        most = batch * bands * math.ceil(stage.channels / width)
        programs = math.prod(launch.grid)
        assert programs == most or 2 * programs > H100.sm_count, stage
        if batch == 1 and stage.height >= 96:
            assert programs > H100.sm_count - blocks, stage

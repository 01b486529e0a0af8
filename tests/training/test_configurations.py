"""The configuration files for ``accelerate launch`` in the package; test_two_processes.py launches them."""

from importlib.resources import files

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from focalnet.models.layers import FocalNetLayer
from focalnet.training import recipe_names

FOLDER = files("focalnet.recipes") / "accelerate"
EXPECTED = {
    "one_machine": (DistributedType.MULTI_GPU, 1, 8),
    "two_machines": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
}


def test_these_are_all_and_none_is_a_recipe():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in EXPECTED}
    assert not set(recipe_names()) & set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    """Its reader refuses fields that it does not know."""
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (read.distributed_type, read.num_machines, read.num_processes) == EXPECTED[name]
    # The recipe or --bf16 says what to compute in.
    assert read.mixed_precision is None


def test_fsdp2_shards_blocks_and_recomputes_them():
    read = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert read["fsdp_version"] == 2 and read["fsdp_activation_checkpointing"]
    assert read["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert read["fsdp_transformer_layer_cls_to_wrap"] == FocalNetLayer.__name__

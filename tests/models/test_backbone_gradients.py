"""Every parameter of a backbone that wants a gradient gets one: DistributedDataParallel stops where one stays away."""

import pytest
import torch
import transformers
from small_models import SMALL, build, images, one_thread  # noqa: F401
from torch.nn.parallel import DistributedDataParallel
from transformers_testing import registered_auto_classes

import focalnet

MAPS = [["stem"], ["stage1"], ["stage2"], ["stage1", "stage3"], ["stem", "stage1", "stage2", "stage3"]]
BEFORE = pytest.mark.parametrize("before", [False, True], ids=["transformers' maps", "maps before downsampling"])


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def backbone(**fields):
    return build(focalnet, "FocalNetBackbone", SMALL | {"drop_path_rate": 0.0} | fields)


def frozen_of(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train_for_two_steps(model, step):
    """The second one raises if a gradient was missing in the first."""
    distributed = DistributedDataParallel(model.train())
    for _ in range(2):
        step(distributed).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@BEFORE
@pytest.mark.parametrize("maps", MAPS, ids=" ".join)
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_a_backbone_trains_distributed_whatever_maps_it_gives(maps, before, norms, process_group):
    fields = {"feature_maps_before_downsampling": before, "use_feature_map_norms": norms}
    model = backbone(out_features=maps, **fields)
    train_for_two_steps(model, lambda m: sum(x.square().sum() for x in m(images(29, 50)).feature_maps))
    if "stage3" in maps:
        assert len(frozen_of(model)) == (0 if norms else 2)


@BEFORE
def test_a_segmenter_from_a_checkpoint_trains_distributed(before, process_group, tmp_path):
    fields = {"feature_maps_before_downsampling": before, "out_features": ["stem", "stage1", "stage2", "stage3"]}
    with registered_auto_classes():
        config = transformers.UperNetConfig(
            backbone_config=backbone(**fields).config,
            hidden_size=8,
            pool_scales=[2],
            auxiliary_in_channels=backbone(**fields).channels[2],
            auxiliary_channels=8,
            num_labels=4,
        )
        transformers.UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
        model = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    labels = torch.randint(4, (2, 64, 64))
    train_for_two_steps(model, lambda m: m(images(64, 64), labels=labels).loss)


def test_what_wants_no_gradient_is_saved_and_loaded_all_the_same(tmp_path):
    model = backbone(out_features=["stage1"])
    assert any(name.startswith("focalnet.encoder.stages.1.") for name in frozen_of(model))
    model.save_pretrained(tmp_path)
    for library in (focalnet, transformers):
        loaded, info = library.FocalNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert loaded.state_dict().keys() == model.state_dict().keys()
        if library is focalnet:
            assert frozen_of(loaded) == frozen_of(model)


def test_other_maps_and_hidden_states_that_are_asked_for_have_their_gradients():
    norm = {"focalnet.layernorm.weight", "focalnet.layernorm.bias"}
    model = backbone(out_features=["stage1"])
    model.out_features = ["stage3"]
    assert frozen_of(model.train()) == norm
    for fields, arguments in (({"output_hidden_states": True}, {}), ({}, {"output_hidden_states": True})):
        model = backbone(out_features=["stage1"], **fields).train()
        sum(tokens.square().sum() for tokens in model(images(), **arguments).hidden_states).backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == frozen_of(model) == norm


def test_who_freezes_a_backbone_has_it_frozen():
    model = backbone(out_features=["stage1"]).requires_grad_(False).train()
    assert not model(images(), output_hidden_states=True).hidden_states[-1].requires_grad
    assert len(frozen_of(model)) == len(list(model.parameters()))

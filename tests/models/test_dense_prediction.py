"""FocalNetBackbone under transformers' dense predictors: made from a configuration file, through AutoBackbone, trained
for a step, saved and loaded.
"""

import json

import pytest
import torch
import transformers
from small_models import assert_equal, images, one_thread  # noqa: F401
from transformers_testing import registered_auto_classes

import focalnet

SIZE = (50, 70)  # no multiple of any stride


@pytest.fixture(autouse=True)
def auto_classes():
    with registered_auto_classes():
        yield


def backbone_fields(before_downsampling):
    """As they stand in a configuration file."""
    return {
        "model_type": "focalnet",
        "embed_dim": 12,
        "hidden_sizes": [24, 48, 96, 96],
        "depths": [1, 1, 1, 1],
        "drop_path_rate": 0.0,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "feature_maps_before_downsampling": before_downsampling,
    }


def upernet(backbone_config):
    labels = torch.randint(4, (2, *SIZE))
    config = {
        "hidden_size": 8,
        "pool_scales": [1, 2],
        "auxiliary_in_channels": 48 if backbone_config["feature_maps_before_downsampling"] else 96,
        "auxiliary_channels": 8,
        "num_labels": 4,
    }
    return transformers.UperNetForSemanticSegmentation, transformers.UperNetConfig, config, {"labels": labels}


MASKS = {
    "mask_labels": [torch.rand(2, *SIZE).round(), torch.rand(1, *SIZE).round()],
    "class_labels": [torch.tensor([0, 3]), torch.tensor([1])],
}


def maskformer(backbone_config):
    decoder = transformers.DetrConfig(
        d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_queries=6
    )
    config = {"decoder_config": decoder, "fpn_feature_size": 32, "mask_feature_size": 16, "num_labels": 4}
    return transformers.MaskFormerForInstanceSegmentation, transformers.MaskFormerConfig, config, MASKS


def mask2former(backbone_config):
    config = {
        "feature_size": 32,
        "mask_feature_size": 16,
        "hidden_dim": 16,
        "encoder_feedforward_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "dim_feedforward": 16,
        "num_attention_heads": 2,
        "num_queries": 6,
        "train_num_points": 32,
        "num_labels": 4,
    }
    return transformers.Mask2FormerForUniversalSegmentation, transformers.Mask2FormerConfig, config, MASKS


def deformable_detr(backbone_config):
    config = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 6,
        "num_feature_levels": 4,
        "num_labels": 4,
        "disable_custom_kernels": True,
    }
    boxes = [torch.tensor([[0.5, 0.5, 0.4, 0.6]]), torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.5, 0.3]])]
    labels = [{"class_labels": torch.arange(len(box)), "boxes": box} for box in boxes]
    return transformers.DeformableDetrForObjectDetection, transformers.DeformableDetrConfig, config, {"labels": labels}


LOGITS = {upernet: "logits", maskformer: "class_queries_logits", mask2former: "class_queries_logits"}


@pytest.mark.parametrize("before_downsampling", [False, True], ids=["transformers' maps", "maps before downsampling"])
@pytest.mark.parametrize("head", [upernet, maskformer, mask2former, deformable_detr])
def test_dense_predictors_of_transformers_train_on_the_backbone(head, before_downsampling, tmp_path):
    fields = backbone_fields(before_downsampling)
    model_class, config_class, config, targets = head(fields)
    config_class(**config, backbone_config=focalnet.FocalNetConfig(**fields)).save_pretrained(tmp_path / "config")
    saved = json.loads((tmp_path / "config" / "config.json").read_text())["backbone_config"]
    assert saved["model_type"] == "focalnet"
    assert saved.get("feature_maps_before_downsampling", False) is before_downsampling

    torch.manual_seed(0)
    model = model_class(transformers.AutoConfig.from_pretrained(tmp_path / "config")).train()
    (backbone,) = (module for module in model.modules() if isinstance(module, focalnet.FocalNetBackbone))
    assert backbone.channels == ([12, 24, 48, 96] if before_downsampling else [24, 48, 96, 96])
    sizes = [(13, 18), (7, 9), (4, 5), (2, 3)] if before_downsampling else [(7, 9), (4, 5), (2, 3), (2, 3)]
    given = []
    hook = backbone.register_forward_hook(lambda _, __, output: given.extend(output.feature_maps))

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(images(*SIZE), **targets).loss
    hook.remove()
    assert [feature_map.shape[2:] for feature_map in given] == sizes
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in backbone.named_parameters():
        if not name.startswith("focalnet.layernorm"):  # behind the maps
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    stem = backbone.focalnet.embeddings.patch_embeddings.projection.weight
    before = stem.detach().clone()
    optimizer.step()
    assert not torch.equal(stem, before)

    model.save_pretrained(tmp_path / "model")
    loaded = model_class.from_pretrained(tmp_path / "model").eval()
    name = LOGITS.get(head, "logits")
    with torch.no_grad():
        actual, expected = (m(images(40, 96))[name] for m in (loaded, model.eval()))
    assert_equal(actual, expected)


def test_auto_backbone_gives_ours_from_a_file(tmp_path):
    focalnet.FocalNetConfig(**backbone_fields(True)).save_pretrained(tmp_path)
    backbone = transformers.AutoBackbone.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert type(backbone) is focalnet.FocalNetBackbone
    assert backbone.channels == [12, 24, 48, 96]
    with torch.no_grad():
        maps = backbone.eval()(images(*SIZE)).feature_maps
    assert [m.shape[2:] for m in maps] == [(13, 18), (7, 9), (4, 5), (2, 3)]

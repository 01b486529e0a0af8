"""from_pretrained: a single file in any format behaves as the folder of the same model does, in every argument."""

import pytest
import torch
from model_files import SMALL, assert_same_bits, file_of, message_of, randomized
from safetensors.torch import load_file

import focalnet
from focalnet import FocalNetConfig, FocalNetForImageClassification, convert_checkpoint

ANIMALS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
FIVE = {"id2label": dict(enumerate("abcde")), "label2id": {name: index for index, name in enumerate("abcde")}}
ANY_SIZE = {"ignore_mismatched_sizes": True}
ARGUMENTS = [
    {},
    FIVE,
    {"id2label": FIVE["id2label"]},
    {"label2id": FIVE["label2id"]},
    {**ANIMALS, **ANY_SIZE},
    {**ANIMALS, "num_labels": 2, **ANY_SIZE},
    {"num_labels": 5},
    {"num_labels": 3, **ANY_SIZE},
    {"num_labels": 3},
    ANIMALS,
    {"num_channels": 1, **ANY_SIZE},
    {"num_channels": 1, "num_labels": 7, **ANY_SIZE},
    {"num_channels": 3, **ANY_SIZE},
    {"focal_windows": [5, 7], **ANY_SIZE},
    {"problem_type": "multi_label_classification", "drop_path_rate": 0.5},
    {"image_size": 64, "hidden_dropout_prob": 0.1, "return_dict": False, "output_hidden_states": True},
    {"layer_norm_eps": 1e-3, "hidden_act": "relu"},
    {"dtype": torch.float16},
    {"dtype": "float16"},
    {"dtype": "auto"},
    {"torch_dtype": torch.bfloat16},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"low_cpu_mem_usage": True},
    {"use_safetensors": True},
    {"attn_implementation": "eager"},
    {"key_mapping": {"never": "there"}},
    {"_fast_init": False},
]
TOLD_BY_SHAPES = {"hidden_sizes": [16, 16], "encoder_stride": 8}
CONFIGS = [
    lambda config, folder: config,
    lambda config, folder: str(folder),
    lambda config, folder: folder,
]


@pytest.fixture(scope="module", params=["authors", "timm", "transformers"])
def places(request, tmp_path_factory):
    """A folder and a file of one model, and what the file does not tell."""
    folder = tmp_path_factory.mktemp("places")
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL, **TOLD_BY_SHAPES)))
    saved = file_of(model, "transformers", folder)
    if request.param == "transformers":
        return saved, saved / "model.safetensors", {}
    path = folder / {"authors": "model.pth", "timm": "model.safetensors"}[request.param]
    return saved, path, convert_checkpoint(saved, path, request.param).pass_when_reading


def loaded(path, arguments, name="FocalNetForImageClassification"):
    """(model, loading info) or the error."""
    torch.manual_seed(0)
    try:
        return getattr(focalnet, name).from_pretrained(path, output_loading_info=True, **arguments)
    except (ValueError, RuntimeError) as error:
        return error


def facts(model):
    config = {name: value for name, value in model.config.to_dict().items() if name not in _UNALIKE}
    devices = {parameter.device for parameter in model.parameters()}
    return config, model.dtype, devices, model.training, type(model), getattr(model, "hf_device_map", None)


# transformers_version is that of whoever wrote config.json. These are in config.json, and no file of weights has them.
_UNALIKE = {"architectures", "_name_or_path", "transformers_version", "drop_incomplete_patches"}


def assert_alike(folder, file, arguments, settings, **options):
    expected, got = loaded(folder, arguments, **options), loaded(file, {**settings, **arguments}, **options)
    if isinstance(expected, Exception):
        assert isinstance(got, Exception)
        assert "ignore_mismatched_sizes" in str(expected)
        assert "size" in str(got) or "ignore_mismatched_sizes" in str(got)
        return
    assert not isinstance(got, Exception), got
    assert facts(got[0]) == facts(expected[0])
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert set(got[1][what]) == set(expected[1][what])
    new = {entry[0] for entry in expected[1]["mismatched_keys"]} | set(expected[1]["missing_keys"])
    states = [{n: t for n, t in model.state_dict().items() if n not in new} for model, _ in (got, expected)]
    assert_same_bits(*states)
    assert got[0].config.name_or_path == str(file)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ", ".join(arguments) or "none")
def test_arguments(arguments, places):
    folder, file, settings = places
    assert_alike(folder, file, arguments, settings)


@pytest.mark.parametrize("make", CONFIGS, ids=["object", "str", "path"])
def test_config(make, places):
    folder, file, settings = places
    config = FocalNetConfig(**SMALL, layer_norm_eps=1e-3, **{**settings, "drop_incomplete_patches": False})
    config.save_pretrained(folder.parent / "config")
    assert_alike(folder, file, {"config": make(config, folder.parent / "config")}, {})
    if make is not CONFIGS[0]:
        assert_alike(folder, file, {"config": make(config, folder.parent / "config"), "num_labels": 2, **ANY_SIZE}, {})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FocalNetModel", {}),
        ("FocalNetModel", {"add_pooling_layer": False}),
        ("FocalNetModel", {"use_mask_token": True}),
        ("FocalNetForMaskedImageModeling", {"encoder_stride": 8}),
        ("FocalNetBackbone", {"out_features": ["stage1", "stage2"]}),
        ("FocalNetBackbone", {"out_indices": [1], "feature_maps_before_downsampling": True}),
    ],
)
def test_other_classes(name, arguments, places):
    folder, file, settings = places
    assert_alike(folder, file, arguments, settings, name=name)


def test_the_arguments_that_are_compared_have_effects(places):
    """What the issue of fine-tuning is about: two animals, out of a file."""
    _, file, settings = places
    model = FocalNetForImageClassification.from_pretrained(file, **settings, **ANIMALS, **ANY_SIZE)
    assert model.classifier.out_features == 2
    assert model.config.num_labels == 2
    assert model.config.id2label == {0: "cat", 1: "dog"}
    grey = FocalNetForImageClassification.from_pretrained(file, **settings, num_channels=1, **ANY_SIZE)
    assert grey(torch.randn(1, 1, 32, 32)).logits.shape == (1, 5)


def test_directories_of_timm_are_read(tmp_path):
    """They have a config.json without model_type, and names that transformers would not find."""
    model = randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL)))
    file_of(model, "timm", tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "focalnet_tiny_srf", "num_classes": 5}')
    loaded = FocalNetForImageClassification.from_pretrained(tmp_path, normalize_modulator=False)
    assert_same_bits(model.state_dict(), loaded.state_dict())
    assert loaded.config.drop_incomplete_patches
    assert load_file(tmp_path / "model.safetensors").keys().isdisjoint(model.state_dict())


def test_directories_of_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "swin", "architectures": ["SwinModel"]}')
    message = message_of(ValueError, FocalNetForImageClassification.from_pretrained, tmp_path)
    for said in (str(tmp_path), "'swin' (SwinModel)", "expected 'focalnet'", "AutoModel"):
        assert said in message

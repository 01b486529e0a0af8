"""focalnet among transformers' own: weights, configurations, outputs and losses are interchangeable, and so are the
Auto classes, image processors and pipelines.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small_models import (
    CLASS,
    CLASS_WITH_HEAD,
    EVERY_OPTION,
    FIELDS,
    SMALL,
    assert_equal,
    assert_same_gradients,
    build,
    images,
    one_thread,  # noqa: F401
    tensors,
)
from transformers_testing import registered_auto_classes

import focalnet


def python(code):
    """What a fresh Python prints, line by line."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# --- weights and configurations


@FIELDS
@CLASS
@pytest.mark.parametrize("source, target", [(focalnet, transformers), (transformers, focalnet)], ids=["to", "from"])
def test_a_saved_model_loads_in_the_other_library(name, fields, source, target, tmp_path):
    model = build(source, name, fields)
    model.save_pretrained(tmp_path / "first")
    loaded, info = getattr(target, name).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()), info
    loaded.save_pretrained(tmp_path / "second")

    assert (tmp_path / "first/model.safetensors").is_file()
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    with torch.no_grad():
        pixel_values = images(29, 50)
        if name == "FocalNetForMaskedImageModeling":
            pixel_values = images(32, 32)  # the only size that transformers reconstructs as an image
        assert_equal(loaded.eval()(pixel_values), model(pixel_values))


@CLASS_WITH_HEAD
def test_a_headless_checkpoint_of_transformers_loads_into_a_model_with_a_head(name, tmp_path):
    headless = build(transformers, "FocalNetModel", SMALL)
    headless.save_pretrained(tmp_path)
    model, info = getattr(focalnet, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(key.startswith(("classifier.", "decoder.")) or "mask_token" in key for key in info["missing_keys"])
    for key, value in headless.state_dict().items():
        torch.testing.assert_close(model.focalnet.state_dict()[key], value, rtol=0, atol=0)


@CLASS_WITH_HEAD
def test_a_checkpoint_of_transformers_with_a_head_loads_into_the_headless_model(name, tmp_path):
    model = build(transformers, name, SMALL)
    model.save_pretrained(tmp_path)
    headless, info = focalnet.FocalNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert_equal(headless.eval()(images()).last_hidden_state, model.focalnet(images()).last_hidden_state)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        SMALL,
        EVERY_OPTION,
        {"image_size": (64, 32), "patch_size": [4, 4]},
        {"out_features": ["stage1", "stage3"]},
        {"out_indices": (1, 2)},
        {"out_indices": [-2, -1]},
        {"depths": (2, 2, 6, 2), "hidden_sizes": (192, 384, 768, 768)},
        {"hidden_dropout_prob": 0, "drop_path_rate": 0},
        {"num_labels": 0},
        {"num_labels": 1, "problem_type": "regression"},
        {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}},
        {"return_dict": False, "output_hidden_states": True, "dtype": "bfloat16"},
        {"a_field_of_the_user": 3},
    ],
    ids=lambda fields: " ".join(fields) or "defaults",
)
def test_a_configuration_is_the_same_json_and_reads_transformers_json(fields):
    ours, theirs = focalnet.FocalNetConfig(**fields), transformers.FocalNetConfig(**fields)
    assert ours.to_json_string() == theirs.to_json_string()
    assert focalnet.FocalNetConfig(**theirs.to_dict()).to_json_string() == theirs.to_json_string()
    assert transformers.FocalNetConfig(**ours.to_dict()).stage_names == ours.stage_names


def test_fields_beyond_transformers_are_saved_once_they_are_set_and_transformers_reads_over_them(tmp_path):
    fields = {"feature_maps_before_downsampling": True, "use_feature_map_norms": True, "stem_padding": 3}
    config = focalnet.FocalNetConfig(**EVERY_OPTION, **fields)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in fields} == fields
    assert focalnet.FocalNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert transformers.FocalNetConfig.from_pretrained(tmp_path).embed_dim == config.embed_dim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_from_pretrained_casts_to_the_dtype_asked_for(dtype, tmp_path):
    build(transformers, "FocalNetForImageClassification", SMALL).save_pretrained(tmp_path)
    model = focalnet.FocalNetForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# --- modules

# What users replace, hook and wrap; the rest are classes of either library.
PLAIN = (
    torch.nn.AdaptiveAvgPool1d,
    torch.nn.Conv2d,
    torch.nn.Dropout,
    torch.nn.GELU,
    torch.nn.LayerNorm,
    torch.nn.Linear,
    torch.nn.ModuleList,
    torch.nn.PixelShuffle,
    torch.nn.Sequential,
)


@FIELDS
@CLASS
def test_every_module_of_transformers_has_its_like_under_the_same_name(name, fields):
    ours, theirs = (
        {key: type(m) if isinstance(m, PLAIN) else None for key, m in build(library, name, fields).named_modules()}
        for library in (focalnet, transformers)
    )
    assert ours == theirs


# --- outputs


@CLASS
@pytest.mark.parametrize("output_hidden_states", [False, True], ids=["", "hidden states"])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_outputs_and_tuples_are_those_of_transformers(name, output_hidden_states, by):
    wanted = {"output_hidden_states": output_hidden_states}
    fields, arguments = (SMALL, wanted) if by == "argument" else (SMALL | wanted, {})
    theirs = build(transformers, name, fields)
    with torch.no_grad():
        expected = theirs(images(), **arguments)
        as_dict = build(focalnet, name, fields)(images(), **arguments)
        no_dict = {"return_dict": False}
        if by == "argument":
            as_tuple = build(focalnet, name, fields)(images(), **arguments, **no_dict)
        else:
            as_tuple = build(focalnet, name, fields | no_dict)(images())
        expected_tuple = theirs(images(), **arguments, **no_dict)

    assert list(as_dict.keys()) == list(expected.keys())
    assert_equal(as_dict, expected)
    assert isinstance(as_tuple, tuple)
    # transformers' tuples leave reshaped_hidden_states out; here they come last.
    assert_equal(as_tuple[: len(expected_tuple)], expected_tuple)
    assert_equal(as_tuple[len(expected_tuple) :], expected.get("reshaped_hidden_states") or ())


def test_a_tuple_starts_with_the_loss():
    model = build(focalnet, "FocalNetForImageClassification", SMALL)
    labels = torch.tensor([0, 4])
    expected = model(images(), labels=labels)
    assert_equal(model(images(), labels=labels, return_dict=False), (expected.loss, expected.logits))
    model = build(focalnet, "FocalNetForMaskedImageModeling", SMALL)
    mask = torch.ones(2, 64, dtype=torch.bool)
    expected = model(images(), mask)
    assert_equal(model(images(), mask, return_dict=False), (expected.loss, expected.reconstruction))


LABELS = {
    "classes": (5, None, torch.tensor([0, 4])),
    "classes, named": (5, "single_label_classification", torch.tensor([3, 1])),
    "classes, one ignored": (5, None, torch.tensor([-100, 2])),
    "many labels": (5, None, torch.tensor([[0.0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])),
    "many labels, named": (5, "multi_label_classification", torch.tensor([[0.0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])),
    "regression of one value": (1, None, torch.tensor([0.5, -2.0])),
    "regression of one value, (B, 1)": (1, "regression", torch.tensor([[0.5], [-2.0]])),
    "regression of many values": (5, "regression", torch.linspace(-1, 1, 10).view(2, 5)),
}


@pytest.mark.parametrize("num_labels, problem_type, labels", LABELS.values(), ids=LABELS)
def test_losses_and_gradients_of_classification_and_regression_are_those_of_transformers(
    num_labels, problem_type, labels
):
    fields = SMALL | {"num_labels": num_labels, "problem_type": problem_type}
    ours, theirs = (build(library, "FocalNetForImageClassification", fields) for library in (focalnet, transformers))
    actual, expected = ours(images(29, 50), labels=labels), theirs(images(29, 50), labels=labels)
    assert_equal(actual, expected)
    assert ours.config.problem_type == theirs.config.problem_type
    actual.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


def test_without_labels_to_tell_apart_the_logits_are_the_pooled_features():
    model = build(focalnet, "FocalNetForImageClassification", SMALL | {"num_labels": 0})
    assert isinstance(model.classifier, torch.nn.Identity)
    with torch.no_grad():
        assert_equal(model(images()).logits, model.focalnet(images()).pooler_output)


# --- masked image modelling


def random_mask(length, batch=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.6


@FIELDS
@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32], ids=str)
def test_masked_image_modelling_at_the_configured_size_is_that_of_transformers(fields, kind):
    ours, theirs = (build(library, "FocalNetForMaskedImageModeling", fields) for library in (focalnet, transformers))
    mask = random_mask(64).to(kind)
    actual, expected = (model(images(), bool_masked_pos=mask) for model in (ours, theirs))
    assert_equal(actual, expected)
    # Ill-conditioned: in float32 the gradients of transformers itself are off by up to 3e-5 of the largest.
    for model in (ours.double(), theirs.double()):
        model(images(dtype=torch.float64), bool_masked_pos=mask).loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (48, 16), (29, 50), (4, 4), (33, 31)])
@pytest.mark.parametrize(
    "stem, stride",
    [({}, 4), ({"use_conv_embed": True}, 4), ({"use_conv_embed": True, "patch_size": 8}, 4), ({"patch_size": 2}, 2)],
    ids=["patches", "conv embed", "conv embed, patch_size 8", "patch_size 2"],
)
def test_masked_image_modelling_reconstructs_images_of_any_size(stem, stride, height, width):
    fields = SMALL | stem | {"encoder_stride": 4 * stride}
    model = build(focalnet, "FocalNetForMaskedImageModeling", fields)
    pixel_values = images(height, width)
    embeddings = model.focalnet.embeddings(pixel_values)
    rows, columns = embeddings.shape[1:3]
    assert rows * stride >= height and columns * stride >= width
    mask = random_mask(rows * columns)
    outputs = model(pixel_values, bool_masked_pos=mask)

    last = model.focalnet(pixel_values, bool_masked_pos=mask, output_hidden_states=True)
    last_map = last.last_hidden_state.transpose(1, 2).view_as(last.reshaped_hidden_states[-1])
    assert_equal(outputs.reconstruction, model.decoder(last_map)[:, :, :height, :width])
    error, pixels = 0.0, 0
    for image, row, column in itertools.product(range(2), range(rows), range(columns)):
        if mask[image, row * columns + column]:
            y, x = slice(row * stride, (row + 1) * stride), slice(column * stride, (column + 1) * stride)
            difference = (outputs.reconstruction - pixel_values)[image, :, y, x]
            error, pixels = error + difference.abs().sum(), pixels + difference[0].numel()
    assert_equal(outputs.loss, error / (pixels + 1e-5) / 3)


def test_logits_is_another_name_for_the_reconstruction():
    outputs = build(focalnet, "FocalNetForMaskedImageModeling", SMALL)(images())
    assert outputs.logits is outputs.reconstruction
    assert list(outputs) == ["reconstruction"]


def test_masked_patches_do_not_reach_the_features_and_others_do():
    model = build(focalnet, "FocalNetForMaskedImageModeling", SMALL)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 9] = True  # the patch at row 1, column 1
    changed = images()
    changed[:, :, 4:8, 4:8] = 0
    with torch.no_grad():
        assert torch.equal(model(changed, mask).reconstruction, model(images(), mask).reconstruction)
        assert not torch.equal(model(changed).reconstruction, model(images()).reconstruction)


# --- Auto classes


AUTO_CLASSES = """
import transformers
config = transformers.FocalNetConfig(embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3])
config.save_pretrained({folder!r})

def print_classes():
    config = transformers.AutoConfig.from_pretrained({folder!r})
    print(type(config).__module__)
    for name in "AutoModel", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling", "AutoBackbone":
        print(type(getattr(transformers, name).from_config(config)).__module__)

import focalnet
focalnet.FocalNetModel
print_classes()
focalnet.register_auto_classes()
print_classes()
focalnet.register_auto_classes()
print_classes()
"""


def test_importing_focalnet_leaves_the_auto_classes_alone_and_registering_changes_them(tmp_path):
    lines = python(AUTO_CLASSES.format(folder=str(tmp_path)))
    theirs = ["transformers.models.focalnet.configuration_focalnet"]
    theirs += ["transformers.models.focalnet.modeling_focalnet"] * 4
    ours = ["focalnet.configuration"] + ["focalnet.models.modeling"] * 4
    assert lines == theirs + ours + ours


@pytest.fixture
def auto_classes():
    with registered_auto_classes():
        yield


@pytest.mark.parametrize(
    "auto_class, name",
    [
        ("AutoModel", "FocalNetModel"),
        ("AutoModelForImageClassification", "FocalNetForImageClassification"),
        ("AutoModelForMaskedImageModeling", "FocalNetForMaskedImageModeling"),
    ],
)
def test_registered_auto_classes_load_a_checkpoint_of_transformers(auto_class, name, auto_classes, tmp_path):
    saved = build(transformers, name, SMALL)
    saved.save_pretrained(tmp_path)
    model = getattr(transformers, auto_class).from_pretrained(tmp_path).eval()
    assert type(model) is getattr(focalnet, name)
    with torch.no_grad():
        assert_equal(model(images()), saved(images()))


# --- backbone maps


@pytest.mark.parametrize("embed_dim", [8, 12, 20])
@pytest.mark.parametrize("before_downsampling", [False, True], ids=["transformers' maps", "maps before downsampling"])
def test_channels_and_hidden_states_fit_the_maps_for_any_embed_dim_and_stale_hidden_sizes(
    embed_dim, before_downsampling
):
    config = focalnet.FocalNetConfig(
        embed_dim=embed_dim,
        depths=[1, 1, 1, 1],
        out_features=["stem", "stage1", "stage2", "stage3", "stage4"],
        feature_maps_before_downsampling=before_downsampling,
    )
    assert config.hidden_sizes == (192, 384, 768, 768)
    model = focalnet.FocalNetBackbone(config).eval()
    with torch.no_grad():
        outputs = model(images(50, 70), output_hidden_states=True)
    assert model.channels == [feature_map.shape[1] for feature_map in outputs.feature_maps]
    for tokens, feature_map in zip(outputs.hidden_states, outputs.feature_maps, strict=True):
        assert_equal(tokens.transpose(1, 2).view_as(feature_map), feature_map)


# --- image processors and pipelines

# Of microsoft/focalnet-tiny.
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return transformers.AutoImageProcessor.from_pretrained(tmp_path)


@pytest.fixture
def picture():
    rows, columns = np.mgrid[0:61, 0:83]
    return Image.fromarray(np.stack([4 * rows, 3 * columns, rows + columns], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@CLASS
def test_what_the_image_processor_gives_is_taken_as_it_is(name, dtype, processor, picture):
    inputs = processor(images=[picture, picture.rotate(90)], return_tensors="pt")
    assert inputs["pixel_values"].dtype == torch.float32
    model = build(focalnet, name, SMALL).to(dtype)
    with torch.no_grad():
        outputs = tensors(model(**inputs))
        assert {tensor.dtype for tensor in outputs} == {dtype}
        assert_equal(outputs, tensors(model(inputs["pixel_values"].to(dtype))))


def test_the_image_classification_pipeline_gives_the_answers_of_transformers(processor, picture):
    labels = {"id2label": dict(enumerate("abcde")), "label2id": {label: i for i, label in enumerate("abcde")}}
    fields = {**SMALL, **labels, "num_labels": 5}
    actual, expected = (
        transformers.pipeline(
            "image-classification",
            model=build(library, "FocalNetForImageClassification", fields),
            image_processor=processor,
        )([picture, picture.rotate(90)], top_k=5)
        for library in (focalnet, transformers)
    )
    assert [[answer["label"] for answer in answers] for answers in actual] == [
        [answer["label"] for answer in answers] for answers in expected
    ]
    scores = [torch.tensor([[answer["score"] for answer in answers] for answers in x]) for x in (actual, expected)]
    assert_equal(*scores)


@pytest.mark.parametrize("wanted", [2, [0, -1], []], ids=str)
def test_the_backbone_gives_the_hidden_states_that_indices_select(wanted):
    ours, theirs = (build(library, "FocalNetBackbone", SMALL) for library in (focalnet, transformers))
    mine, expected = (model(images(), output_hidden_states=wanted).hidden_states or () for model in (ours, theirs))
    assert [tokens is None for tokens in mine] == [tokens is None for tokens in expected]
    for ours_tokens, their_tokens in zip(mine, expected, strict=True):
        if their_tokens is not None:
            assert_equal(ours_tokens, their_tokens)

"""The parts of a step: views, augmentation, mixing, masks, groups of parameters, the average of the weights."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, EVERYTHING, PLAIN, class_folders, reader

from focalnet import FocalNetConfig, FocalNetForImageClassification, FocalNetForMaskedImageModeling
from focalnet.training.augmentation import GROUP, Augment, Mix
from focalnet.training.averaging import Average
from focalnet.training.masks import random_masks
from focalnet.training.optimizer import depth_of, parameter_groups
from focalnet.training.sources import load_source
from focalnet.training.trainer import mixed_loss
from focalnet.training.views import TrainingViews


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    data = class_folders(tmp_path_factory.mktemp("data") / "squares")
    return TrainingViews(load_source(str(data), reader(), labelled=True).train, reader(), EVERYTHING, [0, 1])


def test_view_depends_on_image_epoch_and_seed_alone(views):
    torch.manual_seed(1)
    first = views[3]["pixels"]
    views[5], torch.rand(9)
    assert torch.equal(views[3]["pixels"], first)
    views.epoch = 1
    assert not torch.equal(views[3]["pixels"], first)
    views.epoch = 0
    assert first.shape == (3, 16, 16) and first.dtype == torch.uint8


def images(count):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_augmentation_is_the_same_for_groups_wherever_their_batch_ends():
    augment, pixels, seeds = Augment(EVERYTHING), images(2 * GROUP), list(range(2 * GROUP))
    whole = augment(pixels, seeds)
    halves = [augment(pixels[part], seeds[part]) for part in (slice(0, GROUP), slice(GROUP, None))]
    assert torch.equal(torch.cat(halves), whole)


def test_augmentation_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Augment(EVERYTHING)(images(4), [1, 2, 3, 4])
    assert torch.equal(torch.rand(3), expected)


def test_without_augmentation_an_image_is_normalised_as_the_processor_does():
    pixels = images(1)
    mean, std = torch.tensor(PLAIN.image_mean), torch.tensor(PLAIN.image_std)
    expected = (pixels[0].permute(1, 2, 0) / 255 - mean) / std
    torch.testing.assert_close(Augment(PLAIN)(pixels, [0])[0], expected.permute(2, 0, 1))


def test_randaugment_changes_images_and_keeps_them_in_range():
    settings = PLAIN.but(randaugment=2, magnitude=9, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    out = Augment(settings)(images(16), list(range(16)))
    assert out.min() >= 0 and out.max() <= 1
    assert (out - images(16) / 255).abs().mean() > 0.02


def test_erased_rectangles_have_the_mean_colour_and_a_share_of_the_area():
    settings = PLAIN.but(erase=1.0)
    erased = Augment(settings)(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8), list(range(64))) == 0
    assert torch.equal(erased.all(1), erased.any(1))
    shares = erased.float().mean((1, 2, 3))
    # kornia rounds the sides of a rectangle to whole pixels.
    assert 0.01 < shares.min() < 0.1 and 0.2 < shares.max() < 0.36


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_share_says_how_much_of_an_image_is_its_own(mixup, cutmix):
    ones = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    mix = Mix(PLAIN.but(mixup=mixup, cutmix=cutmix))
    shares = []
    for seed in range(200):
        mixed, share = mix(ones, seed)
        assert mixed[1].mean().item() == pytest.approx(share, abs=1e-5)
        assert mixed[0].mean().item() == pytest.approx(1 - share, abs=1e-5)
        if cutmix:
            assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8


def test_mixup_draws_from_its_beta_distribution():
    shares = np.array([Mix(PLAIN.but(mixup=0.8))(torch.zeros(2, 3, 4, 4), seed)[1] for seed in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)


def test_loss_of_mixed_labels_is_cross_entropy_with_probabilities():
    logits = torch.randn(4, 5, dtype=torch.float64)
    labels, share = torch.tensor([0, 1, 2, 3]), 0.3
    inputs = {"labels": labels, "other_labels": labels.flip(0), "share": torch.full((4,), share, dtype=torch.float64)}
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    target = share * one_hot + (1 - share) * one_hot.flip(0)
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(mixed_loss(logits, inputs, 0.1), expected)


def test_masks_hide_their_share_in_whole_squares():
    settings = PLAIN.but(mask_ratio=0.6, mask_patch_size=32)
    masks = random_masks([1, 2], (192, 192), 4, settings).view(2, 48, 48)
    squares = masks.view(2, 6, 8, 6, 8).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(squares.all(-1), squares.any(-1))
    assert squares.all(-1).sum((1, 2)).tolist() == [round(0.6 * 36)] * 2
    assert not torch.equal(masks[0], masks[1])


def test_masks_of_any_size_fit_the_stems_grid():
    settings = PLAIN.but(mask_patch_size=8)
    assert random_masks([1], (50, 31), 4, settings).shape == (1, math.ceil(50 / 4) * math.ceil(31 / 4))
    with pytest.raises(ValueError, match="multiple of the stem's stride 4, got 6"):
        random_masks([1], (48, 48), 4, PLAIN.but(mask_patch_size=6))


def deep_model(**fields):
    config = {**CONFIG, "hidden_sizes": [16, 16], "depths": [2, 1], "use_layerscale": True, "image_size": 16, **fields}
    return FocalNetForImageClassification(FocalNetConfig(**config))


def test_norms_biases_layer_scales_and_the_mask_token_do_not_decay():
    config = FocalNetConfig(**CONFIG, use_layerscale=True, use_post_layernorm_in_modulation=True, image_size=16)
    model = FocalNetForMaskedImageModeling(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config.depths, 1.0, 0.05, 1.0)
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    without = {name for name, value in decay.items() if value == 0}
    expected = {
        name for name in decay if name.endswith(("bias", "gamma_1", "gamma_2", "mask_token")) or ".norm" in name
    }
    expected |= {name for name in decay if "layernorm" in name}
    assert without == expected


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("focalnet.embeddings.patch_embeddings.projection.weight", 0),
        ("focalnet.encoder.stages.0.layers.0.norm1.weight", 1),
        ("focalnet.encoder.stages.0.layers.1.mlp.fc1.weight", 2),
        ("focalnet.encoder.stages.0.downsample.projection.weight", 2),
        ("focalnet.encoder.stages.1.layers.0.gamma_1", 3),
        ("focalnet.layernorm.weight", 4),
        ("classifier.weight", 4),
    ],
)
def test_layers_learn_slower_the_further_they_are_from_the_head(name, depth):
    model = deep_model()
    assert depth_of(name, [2, 1]) == depth
    groups = parameter_groups(model, [2, 1], 1.0, 0.05, 0.5)
    (rate,) = {group["lr"] for group in groups for p in group["params"] if p is dict(model.named_parameters())[name]}
    assert rate == 0.5 ** (4 - depth)


def test_average_is_exponential_and_gives_the_place_back():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, 0.5)
    expected = None
    for step in range(20):
        torch.nn.init.constant_(model.weight, float(step))
        average.on_step_end(None, None, None)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 19


def test_random_crop_shows_parts_of_the_whole_image():
    gradient = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    from random import Random

    from focalnet.training.views import random_view

    settings = PLAIN.but(crop_scale=(0.1, 0.3))
    lefts = [random_view(gradient, settings, Random(seed))[0, :, 0].float().mean() for seed in range(50)]
    assert min(lefts) < 20 and max(lefts) > 150
    whole = random_view(gradient, PLAIN, Random(0))[0, 0]
    assert whole[0] < 20 and whole[-1] > 235

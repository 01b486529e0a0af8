"""Recipes: what they hold is what their sources say, and a dry run adds it up."""

import json

import pytest
from command_line import offline_and_undone, run
from small_models import one_thread  # noqa: F401

from focalnet.training import Settings, load_recipe, recipe_names
from focalnet.variants import VARIANTS

PUBLISHED = {f"{name}_224" for name, variant in VARIANTS.items() if name.split("_")[0] in ("tiny", "small", "base")}
PUBLISHED -= {f"{size}_iso_224" for size in ("tiny", "small", "base")}
IMAGENET = ("--images=1281167", "--image-size=64")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_names_its_source_and_a_model(name):
    recipe = load_recipe(name)
    assert len(recipe.source) > 60
    assert recipe.config or recipe.model in VARIANTS or recipe.model in {v.hub for v in VARIANTS.values()}


def test_recipes_of_the_paper_are_there():
    names = set(recipe_names())
    assert names >= PUBLISHED
    assert names >= {"large_fl3_22k", "large_fl3_22k_to_1k_224", "large_fl3_22k_to_1k_384", "simmim_base_lrf_192"}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipe_has_the_authors_settings(name):
    settings = load_recipe(name).settings
    # 8 processes of 128 images: config.py scales its BASE_LR of 5e-4 by the batch over 512.
    assert settings.rates(8 * settings.batch_size) == pytest.approx((1e-3, 1e-5, 1e-6))
    assert settings.drop_path == VARIANTS[name.removesuffix("_224")].drop_path_rate
    assert (settings.epochs, settings.warmup_epochs, settings.weight_decay, settings.clip) == (300, 20, 0.05, 5)
    assert (settings.mixup, settings.cutmix, settings.label_smoothing, settings.erase) == (0.8, 1, 0.1, 0.25)


def test_recipe_from_a_file_may_change_one_setting(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: finetune\nsettings:\n  epochs: 3\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).settings == Settings(epochs=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: sing", "expected one of finetune, pretrain, got 'sing'"),
        ("- a list", "expected a mapping"),
        ("task: finetune\nsettings: {epoch: 3}", "epoch: no such setting"),
        ("task: finetune\nsettings: {betas: [0.9, 2]}", "betas: expected two numbers from 0 to less than 1"),
        ("{", "not readable as YAML"),
    ],
)
def test_bad_recipe_is_refused_by_name(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="recipe mine: ") as error:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert words in str(error.value)


@pytest.fixture
def offline(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


def test_dry_run_counts_steps_and_draws_the_rate(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("finetune", "digits", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    settings = load_recipe("digits").settings
    each_epoch = 1442 // 64
    assert (plan["images"], plan["classes"], plan["batch"]) == (1442, 10, 64)
    assert plan["steps"] == 60 * each_epoch and plan["warmup_steps"] == 3 * each_epoch
    assert max(plan["rates"]) == pytest.approx(settings.learning_rate, rel=1e-3)
    assert plan["rates"][0] == pytest.approx(settings.warmup_learning_rate)
    assert plan["hours"] == pytest.approx(plan["seconds_per_image"] * plan["steps"] * 64 / 3600)
    assert plan["memory_of_weights"] == 20 * plan["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_published_weights_needs_neither_them_nor_the_data(offline):
    result = run("finetune", "imagenet", "--model=microsoft/focalnet-tiny", *IMAGENET, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    # 28.4 million in the authors' table.
    assert plan["parameters"] == pytest.approx(28.4e6, rel=0.005)
    assert plan["steps"] == 30 * (1281167 // 32)


def test_dry_run_shows_the_curve_and_the_source(offline):
    result = run("finetune", "digits", "--dry-run")
    assert "█" in result.stdout and "scans of scikit-learn" in result.stdout

"""bench/learning.py: networks of equal cost, labels drawn by class, curves of the rows."""

from dataclasses import replace

import learning
import learning_curves
import pytest
import torch
from learning_curves import ALL, FEW, PRETRAINED
from small_models import one_thread  # noqa: F401
from small_networks import IMAGE_SIZE, NETWORKS, OURS, size_of
from small_runs import reader

from focalnet.benchmark import rows
from focalnet.training.sources import load_source

MASKED = [name for name, network in NETWORKS.items() if network.masked is not None]
DEVICE = "some CPU"


@pytest.mark.parametrize("what", ["parameters", "flops"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_costs_within_five_percent_what_ours_costs(name, what):
    assert size_of(name)[what] == pytest.approx(size_of(OURS)[what], rel=0.05)


def test_both_focalnets_start_from_the_same_weights():
    ours, theirs = (NETWORKS[name].make_classifier(10, seed=3).state_dict() for name in (OURS, "transformers"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_network_has_a_name():
    assert learning_curves.NAMES.keys() == NETWORKS.keys()


def test_a_tenth_of_each_class_is_kept_another_for_each_seed():
    labels = [0] * 40 + [1] * 61 + [2] * 20
    drawn = [learning.stratified(labels, 0.1, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for places in drawn:
        assert [labels[place] for place in places] == [0] * 4 + [1] * 6 + [2] * 2
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", MASKED)
def test_all_that_was_pretrained_is_taken_over(name):
    masked = NETWORKS[name].make_masked(seed=0).base_model
    model = NETWORKS[name].make_classifier(10, seed=1)
    learning.take_over(model, NETWORKS[name].make_masked(seed=0))
    own = model.base_model.state_dict()
    left = {key for key, tensor in masked.state_dict().items() if key not in own or not torch.equal(own[key], tensor)}
    assert left == {"embeddings.mask_token"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_few_labels_are_learned_from_scratch_and_after_pretraining(name, monkeypatch):
    source = load_source("digits", reader(), labelled=True)
    source = replace(source, train=source.train.select(range(400)), held_out=source.held_out.select(range(50)))
    monkeypatch.setattr(learning, "PRETRAINING", learning.PRETRAINING.but(epochs=1))
    monkeypatch.setattr(learning, "WITH_FEW", learning.WITH_FEW.but(epochs=10))
    scratch, after = learning.with_few_labels(name, 0, source)
    assert (scratch["series"], after["series"]) == (FEW, PRETRAINED)
    assert scratch["images"] == after["images"] == 40
    assert [len(row["accuracy"]) for row in (scratch, after)] == [2, 2]
    assert scratch["accuracy"] != after["accuracy"]


def test_without_a_masked_model_there_is_nothing_to_pretrain():
    assert learning.with_few_labels("ConvNeXt", 0, source=None) == []


def test_what_is_timed_is_a_step_of_training():
    model = NETWORKS["ViT"].make_classifier(10, seed=0).train()
    before = model.classifier.weight.detach().clone()
    learning.step_of(model)(0)
    assert not torch.equal(model.classifier.weight, before)
    (found,) = learning.step_times(["ViT"], rounds=2)
    assert found["median_s"] > 0
    assert (found["runtime"], found["batch"], found["size"]) == ("ViT", learning.WITH_ALL.batch_size, IMAGE_SIZE)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)


def row(seed, accuracy, runtime="focalnet", series=ALL, every=2):
    case = {"case": "learning", "series": series, "runtime": runtime, "seed": seed, "batch": 64, "device": DEVICE}
    return case | {"accuracy": accuracy, "images": 200, "every": every, "parameters": 1e5, "flops": 5e6}


def test_a_curve_has_the_mean_and_the_range_of_its_seeds(results):
    found = [row(0, [0.5, 0.9]), row(1, [0.7, 1.0]), row(0, [0.1, 0.2], "Swin"), row(0, [0.3], series=FEW)]
    step = {"case": "training step", "runtime": "focalnet", "median_s": 0.1}
    rows.write([*found, step], "learning", DEVICE)
    ours, swin = learning_curves.curves(DEVICE, ALL)
    assert (ours.network, ours.epochs, ours.lowest, ours.highest) == ("focalnet", [2, 4], [0.5, 0.9], [0.7, 1.0])
    assert ours.mean == pytest.approx([0.6, 0.95])
    assert (ours.epochs_to(0.6), ours.epochs_to(0.9), ours.epochs_to(0.99)) == (2, 4, None)
    # 200 images are three steps of 64.
    assert ours.epoch_s == pytest.approx(0.3)
    assert swin.epoch_s is None

"""From the same seed, data and recipe, ours and transformers' end at the same accuracy, within the spread of seeds."""

import learning
import pytest
from small_models import one_thread  # noqa: F401
from small_networks import NETWORKS, OURS
from small_runs import reader

from focalnet.training.sources import load_source

SEEDS = (0, 1, 2)
SCANS = 320
SETTINGS = learning.WITH_ALL.but(
    epochs=7, warmup_epochs=1, batch_size=32, learning_rate=3e-3, ema=0.0, rotate=0, shift=0.0, zoom=(1, 1), shear=0
)
# Large first weights: this small network then learns in a few epochs.
FIELDS = {"embed_dim": 16, "hidden_sizes": [32, 32], "depths": [1, 2], "initializer_range": 0.2}


@pytest.fixture(scope="module")
def accuracies():
    """The last accuracy of each seed, by library."""
    source = load_source("digits", reader(), labelled=True)
    table = source.train.select(range(SCANS))
    found = {}
    for name in (OURS, "transformers"):
        network = NETWORKS[name].but(**FIELDS)
        found[name] = [
            learning.learned(
                network.make_classifier(len(source.labels), seed), source, table, SETTINGS.but(seed=seed), every=7
            )["accuracy"][-1]
            for seed in SEEDS
        ]
    return found


@pytest.mark.slow
def test_accuracies_of_a_seed_differ_by_no_more_than_those_of_transformers_seeds(accuracies):
    ours, theirs = accuracies[OURS], accuracies["transformers"]
    spread = max(theirs) - min(theirs)
    assert min(theirs) > 0.6, "they have not learned, and any two would agree"
    assert 0 < spread < 0.1
    assert [abs(a - b) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0, 0, 0], abs=spread)

"""What the tests of commands share: no network, the process as it was afterwards, a small classifier."""

import pytest
from command_line import offline_and_undone, save_model


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    with offline_and_undone(monkeypatch):
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))

"""Helpers for tests built on transformers: its common model tests, and temporary registration in the Auto classes."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import focalnet

# transformers' tests are in its source distribution only; `make test` fetches it and unpacks them here.
FOLDER = Path(os.environ.get("FOCALNET_TRANSFORMERS_TESTS") or Path(sys.prefix, "share", "transformers-tests"))
PACKAGE = "_transformers_common_tests"

# Arguments that every configuration has to keep. transformers has such a list in a module that the source distribution
# leaves out.
CONFIG_COMMON_KWARGS = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def load_common_tests():
    """(test_modeling_common, test_backbone_common, test_configuration_common), or None if they are not there.

    They import each other relatively, so they are loaded as one private package. Stubs replace what they import from
    modules that the source distribution leaves out (tests of generation and of exporters). sys.path is not changed.
    """
    folders = [folder for folder in (FOLDER / "tests", FOLDER) if (folder / "test_modeling_common.py").is_file()]
    if not folders:
        if "FOCALNET_TRANSFORMERS_TESTS" in os.environ:
            raise FileNotFoundError(f"FOCALNET_TRANSFORMERS_TESTS: no test_modeling_common.py in {FOLDER}")
        return None
    for name, contents in {
        "": {"__path__": [str(folders[0])]},
        ".exporters": {"__path__": []},
        ".exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        ".generation": {"__path__": []},
        ".generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        ".utils": {"__path__": []},
        ".utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
    }.items():
        module = types.ModuleType(PACKAGE + name)
        vars(module).update(contents)
        sys.modules[module.__name__] = module
    # Their marks are not registered here, and they would import transformers from the folder above theirs.
    marks = mock.patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True))
    installed = mock.patch.object(transformers.utils, "direct_transformers_import", lambda *_, **__: transformers)
    with marks, installed:
        return tuple(
            importlib.import_module(f"{PACKAGE}.test_{name}_common")
            for name in ("modeling", "backbone", "configuration")
        )


@contextlib.contextmanager
def registered_auto_classes():
    """A context in which the Auto classes return focalnet's classes. Afterwards transformers' own are restored."""
    auto_classes = (
        transformers.AutoModel,
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForMaskedImageModeling,
        transformers.AutoBackbone,
    )
    with contextlib.ExitStack() as stack:
        for mapping in (CONFIG_MAPPING, *(auto_class._model_mapping for auto_class in auto_classes)):
            stack.enter_context(mock.patch.dict(mapping._extra_content))
        focalnet.register_auto_classes()
        yield

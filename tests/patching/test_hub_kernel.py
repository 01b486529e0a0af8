"""The layout for huggingface's `kernels`: generated, loaded from a local path, and put into transformers' model."""

import copy
import re
import subprocess
import sys

import pytest
import torch
import transformers
from small_models import SMALL, assert_equal, assert_same_gradients, build, images, one_thread  # noqa: F401
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

import focalnet
import kernels
from focalnet.hub.generate import generate

NAME = "FocalNetForImageClassification"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("hub") / "focalnet")


@pytest.fixture
def kernelized(repository, monkeypatch):
    """transformers' model before and after `kernelize`."""
    monkeypatch.setattr(FocalNetModulation, "kernel_layer_name", "FocalNetModulation", raising=False)
    layer = kernels.LocalLayerRepository(repository, layer_name="FocalNetModulation")
    original = build(transformers, NAME, SMALL)
    model = copy.deepcopy(original)
    with kernels.use_kernel_mapping({"FocalNetModulation": {"cpu": layer}}, inherit_mapping=False):
        kernels.kernelize(
            model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu", use_fallback=False
        )
    return model, original


def test_a_kernelized_model_of_transformers_computes_the_same(kernelized):
    model, original = kernelized
    modulations = [m for m in model.modules() if isinstance(m, FocalNetModulation)]
    assert len(modulations) == 4 and all("forward" in m.__dict__ for m in modulations)
    for size in ((32, 32), (29, 50)):
        assert_equal(model(images(*size)), original(images(*size)))
    for m in (model, original):
        m(images()).logits.square().sum().backward()
    assert_same_gradients(model, original)


@pytest.mark.slow
def test_a_kernelized_model_compiles_as_one_graph(kernelized):
    model, original = kernelized
    with torch.no_grad():
        actual = torch.compile(model.focalnet, fullgraph=True, backend="eager")(images()).last_hidden_state
        assert_equal(actual, original.focalnet(images()).last_hidden_state)


def test_the_kernel_stands_beside_an_installed_focalnet_and_holds_what_it_needs(repository):
    kernel = kernels.get_local_kernel(repository)
    assert kernel.focal_modulation is not focalnet.focal_modulation
    assert kernel.__file__.startswith(str(repository))
    assert 'name = "focalnet"' in (repository / "build.toml").read_text()
    names = {
        p.relative_to(repository / "torch-ext/focalnet").as_posix() for p in repository.rglob("torch-ext/**/*.py")
    }
    assert {"__init__.py", "layers.py", "operators/focal_modulation.py", "reference.py", "functional.py"} <= names
    assert not {"models/modeling.py", "configuration.py", "cli/__init__.py"} & names
    sources = "".join(p.read_text() for p in repository.rglob("torch-ext/**/*.py"))
    assert not re.search(r"\b(?<!_)focalnet::|torch\.ops\.focalnet\.", sources)
    assert "import transformers" not in sources and "from transformers" not in sources


@pytest.mark.slow
def test_the_script_writes_the_same_again(repository, tmp_path):
    code = f"import sys; sys.path[:0] = {sys.path!r}; sys.argv[1:] = [{str(tmp_path / 'again')!r}]\n"
    code += "import runpy; runpy.run_module('focalnet.hub.generate', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "wrote" in result.stdout, result.stderr
    for path in repository.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (tmp_path / "again" / path.relative_to(repository)).read_bytes() == path.read_bytes()

"""Without the compiled extension, the first call that would have used it says so and how to mend it; no other does."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from operands import Shape, operands

import focalnet
from focalnet.backends import extension
from focalnet.operators import eager

ROOT = Path(__file__).parents[2]
MENDED_BY = "FOCALNET_BUILD=cpu pip install --no-build-isolation --no-deps --force-reinstall ."


@pytest.fixture
def absent(monkeypatch):
    """As if the extension had never been built, and nothing had run yet."""
    monkeypatch.setattr(extension, "_missing", extension.why_absent(Path("nowhere")))
    monkeypatch.setattr(extension, "_warned", False)
    monkeypatch.setattr(eager, "_runs", {})
    monkeypatch.delenv("FOCALNET_BACKEND", raising=False)


def modulate(dtype=torch.float32, **kwargs):
    return focalnet.focal_modulation(*operands(Shape(), dtype), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_call_warns_with_command_and_cost_and_the_second_is_silent(absent, dtype):
    with pytest.warns(UserWarning) as caught:
        modulate(dtype)
    (warning,) = caught
    assert MENDED_BY in str(warning.message) and "twice as long" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modulate(dtype)
        focalnet.gated_aggregation(*operands(Shape())[1:4])


@pytest.mark.parametrize(
    "call",
    [
        lambda: modulate(backend="reference"),
        lambda: modulate(torch.float64),
        lambda: modulate(torch.float16),
        focalnet.backends,
    ],
    ids=["reference asked for", "float64", "float16", "only asked"],
)
def test_who_would_not_have_used_it_is_not_warned(absent, call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_the_environment_variable_ends_the_warning(absent, monkeypatch):
    monkeypatch.setenv("FOCALNET_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modulate()


MODEL = """
import torch, focalnet
config = focalnet.FocalNetConfig(image_size=32, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3])
model = focalnet.FocalNetModel(config).eval()
with torch.inference_mode():
    for _ in range(2):
        model(torch.zeros(1, 3, 32, 32))
model.train()(torch.zeros(1, 3, 32, 32)).pooler_output.sum().backward()
"""


@pytest.fixture
def sources(tmp_path):
    """The package as sources alone, as an install with build isolation leaves it."""
    package = tmp_path / "focalnet"
    package.mkdir()
    for path in (ROOT / "focalnet").iterdir():
        if not path.name.startswith(("_C", "_build_info", "__pycache__")):
            (package / path.name).symlink_to(path)
    (package / "backends").unlink()
    shutil.copytree(ROOT / "focalnet" / "backends", package / "backends")
    (package / "kernels").symlink_to(ROOT / "kernels")
    return tmp_path


def python(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_model_of_an_installation_without_it_warns_once_whatever_it_does(sources):
    done = python(sources, "-W", "always", "-c", MODEL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its compiled CPU kernels") == 1
    assert MENDED_BY in done.stderr


@pytest.mark.slow
def test_python_m_focalnet_is_the_command(sources):
    done = python(sources, "-m", "focalnet", "--version")
    assert done.stdout == f"focalnet {focalnet.__version__}\n"
    assert python(sources, "-m", "focalnet", "no-such-command").returncode == 2

"""Compilers and exporters take our models and patched ones: docs/compatibility.md lists what this file proves."""

import copy
import subprocess
import sys

import onnxruntime
import pytest
import torch
from small_models import assert_equal, images, one_thread  # noqa: F401
from small_sources import MAKE, SOURCE, fast, original, seeded
from sources import TimmModulation
from torch.export import Dim

import focalnet

DYNAMIC = {"images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
WIDE = (32, 48)  # not square, lest a compiler takes the two sides for one
OTHER = (48, 24)


def expected_of(source, *sizes):
    model = original(source)
    with torch.no_grad():
        return [model(images(*size, batch=batch)) for batch, size in enumerate(sizes, start=2)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@SOURCE
def test_compiles_as_one_graph(source, dynamic):
    model = torch.compile(fast(source), fullgraph=True, dynamic=dynamic, backend="eager")
    with torch.no_grad():
        assert_equal(model(images(*WIDE)), expected_of(source, WIDE)[0])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if dynamic:
            assert_equal(model(images(*OTHER, batch=3)), expected_of(source, WIDE, OTHER)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1


def test_inductor_gives_the_same_outputs_and_gradients():
    """On one patched modulation: inductor's C++ takes minutes for a network."""
    patched, original, x = a_modulation()
    results = []
    for module in (torch.compile(patched, fullgraph=True), original):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append([output, leaf.grad, *(p.grad for p in module.parameters())])
    assert_equal(*results)


def a_modulation():
    original = seeded(lambda: TimmModulation(8, 3, 2))
    patched = copy.deepcopy(original)
    focalnet.patch(patched)
    return patched, original, torch.randn(2, 8, 6, 7)


LOAD = """
import sys, torch, focalnet
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2").module()
    images, expected = torch.load(path + ".pt")
    for x, y in zip(images, expected):
        assert (program(x) - y).abs().max() <= 1e-5 * y.abs().max(), path
print("loaded", len(sys.argv) - 1)
"""


def test_exported_programs_run_in_a_fresh_process(tmp_path):
    paths = []
    for source in ("focalnet", "transformers", "authors", "timm"):
        program = torch.export.export(fast(source), (images(*WIDE),), dynamic_shapes=DYNAMIC)
        operators = [node for node in program.graph.nodes if "focalnet.focal_modulation" in str(node.target)]
        assert len(operators) == 2
        paths.append(str(tmp_path / source))
        torch.export.save(program, paths[-1] + ".pt2")
        inputs = [images(*WIDE), images(*OTHER, batch=3)]
        torch.save((inputs, expected_of(source, WIDE, OTHER)), paths[-1] + ".pt")
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + LOAD
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=240)
    assert result.stdout == "loaded 4\n", result.stderr


def test_an_aot_inductor_package_runs(tmp_path):
    patched, original, x = a_modulation()
    shapes = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    program = torch.export.export(patched, (x,), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for inputs in (x, torch.randn(3, 8, 9, 5)):
            assert_equal(package(inputs), original(inputs))


def test_onnx_of_a_patched_model_of_convolutions_has_standard_operators_only_and_runs_at_any_size(tmp_path):
    """timm's; test_any_size.py has our models and transformers'."""
    source, path = "timm", tmp_path / "model.onnx"
    program = torch.onnx.export(fast(source), (images(*WIDE),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, size, expected in zip((2, 3), (WIDE, OTHER), expected_of(source, WIDE, OTHER), strict=True):
        (actual,) = session.run(None, {session.get_inputs()[0].name: images(*size, batch=batch).numpy()})
        assert (torch.from_numpy(actual) - expected).abs().max() <= 1e-4 * expected.abs().max()


LOAD_TRACED = """
import sys, torch
for path in sys.argv[1:]:
    traced = torch.jit.load(path + ".pt")
    images, expected = torch.load(path + ".tensors")
    for x, y in zip(images, expected):
        assert (traced(x) - y).abs().max() <= 1e-5 * y.abs().max(), path
print("loaded", len(sys.argv) - 1, "focalnet" in sys.modules)
"""


def test_traced_modules_run_where_focalnet_is_not_installed(tmp_path):
    paths = []
    for source in MAKE:
        paths.append(str(tmp_path / source))
        torch.jit.trace(fast(source), images(*WIDE)).save(paths[-1] + ".pt")
        inputs = [images(*WIDE), images(*OTHER, batch=3)]
        torch.save((inputs, expected_of(source, WIDE, OTHER)), paths[-1] + ".tensors")
    result = subprocess.run([sys.executable, "-c", LOAD_TRACED, *paths], capture_output=True, text=True)
    assert result.stdout == "loaded 4 False\n", result.stderr


def test_a_backend_that_was_asked_for_keeps_the_operator_in_what_is_traced():
    model = fast("timm")
    with focalnet.use_backend("cpu"):
        traced = torch.jit.trace(model, images(*WIDE))
    assert str(traced.inlined_graph).count("focalnet::focal_modulation") == 2
    with torch.no_grad():
        assert_equal(traced(images(*OTHER, batch=3)), expected_of("timm", WIDE, OTHER)[1])


@pytest.mark.parametrize("source", ["authors", "timm"])  # transformers' cannot be scripted anyway
def test_scripting_is_refused_by_name(source):
    with pytest.raises(
        AttributeError, match=r"torch\.jit\.script cannot compile a module that focalnet\.patch has patched"
    ):
        torch.jit.script(fast(source).model)

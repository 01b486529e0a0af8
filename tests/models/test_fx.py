"""torch.fx traces our layer, our models and patched ones; `patch` tells what a graph runs from what it went into.

torchvision's create_feature_extractor is a tracer that notes where nodes come from, and returns a GraphModule.
"""

import copy
import pickle

import pytest
import torch
from small_models import (
    EVERY_OPTION,
    SMALL,
    assert_equal,
    assert_same_gradients,
    build,
    images,
    one_thread,  # noqa: F401
)
from small_sources import MAKE
from sources import AuthorsModulation, TimmModulation

import focalnet


def is_operator(node):
    return node.op == "call_function" and node.target in (focalnet.focal_modulation, focalnet.gated_aggregation)


def patched(source):
    model = MAKE[source]()
    focalnet.patch(model)
    return model


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("source", ["authors", "timm"])  # transformers' own code branches on sizes
def test_a_patched_model_traces_and_the_graph_holds_the_operator(source, grad):
    model = patched(source)
    with torch.set_grad_enabled(grad):
        graph = torch.fx.symbolic_trace(model)
        assert sum(map(is_operator, graph.graph.nodes)) == 2
        for size in ((64, 96), (32, 48)):
            assert_equal(graph(images(*size)), model(images(*size)))
    restored = pickle.loads(pickle.dumps(graph))
    assert_equal(restored(images()), model(images()))


class Maps(torch.nn.Module):
    def __init__(self, fields):
        super().__init__()
        self.backbone = build(focalnet, "FocalNetBackbone", fields)

    def forward(self, pixel_values):
        return self.backbone(pixel_values).feature_maps


@pytest.mark.parametrize("fields", [SMALL, EVERY_OPTION, {**SMALL, "drop_incomplete_patches": True}])
def test_our_models_trace_for_every_size_and_train(fields):
    model = Maps(fields)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    for size in ((64, 96), (61, 75)):
        outputs, expected = graph(images(*size)), model(images(*size))
        assert_equal(outputs, expected)
    sum(x.square().sum() for x in outputs).backward()
    sum(x.square().sum() for x in expected).backward()
    assert_same_gradients(graph, model)


@pytest.mark.parametrize("make", [focalnet.FocalModulation, AuthorsModulation, TimmModulation])
def test_what_was_changed_is_called_in_the_graph_too(make):
    module = make(8)
    module.focal_layers[0][1] = torch.nn.ReLU()
    if make is not focalnet.FocalModulation:
        module.focal_layers[0][1] = torch.nn.GELU()
        focalnet.patch(module)
        module.focal_layers[0][1] = torch.nn.ReLU()
    x = torch.randn(2, 8, 8, 8)
    graph = torch.fx.symbolic_trace(module)
    assert not any(map(is_operator, graph.graph.nodes))
    assert_equal(graph(x), module(x))


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return hasattr(module, "focal_layers") or super().is_leaf_module(module, name)


def test_patching_a_graph_replaces_what_it_calls_and_says_what_it_went_into():
    model = MAKE["timm"]()
    went_into = torch.nn.Sequential(torch.fx.symbolic_trace(model))
    report = focalnet.patch(went_into)
    assert not report.replaced and len(report.left) == 2
    assert all("traced into a torch.fx graph" in reason for reason in report.left.values())

    calls = torch.fx.GraphModule(model, Leaves().trace(model))
    report = focalnet.patch(calls)
    assert report.replaced == ("layers.0.blocks.0.modulation", "layers.1.blocks.0.modulation")
    assert all("traced into a torch.fx graph" in reason for reason in report.left.values())
    assert_equal(calls(images()), MAKE["timm"]()(images()))


def test_an_exported_program_is_left_alone():
    program = torch.export.export(MAKE["timm"](), (images(),)).module()
    report = focalnet.patch(program)
    assert not report.replaced
    assert all("traced into a torch.fx graph" in reason for reason in report.left.values())

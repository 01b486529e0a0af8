"""``focalnet.inspect``: its maps are those of the specification, on every model, and the model stays as it was."""

import functools

import pytest
import torch
from sklearn.datasets import load_digits
from small_models import one_thread  # noqa: F401
from small_sources import MAKE, SOURCE, fast, original
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import focalnet
from focalnet import FocalModulation, FocalNetForImageClassification, inspect, reference
from focalnet.benchmark.torchvision_stub import stubbed_torchvision
from focalnet.pretrained import shipped

IMAGES = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(3))
NAMES = {"projection_in": "f", "projection_context": "h"}


def inputs_of(model, images):
    """Name of each focal modulation -> what it was called with, (B, H, W, C)."""
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "focal_layers"):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(images)
    return seen


def by_the_specification(module, x):
    """Gates, contexts level by level, aggregate and modulator of a focal modulation, from its weights alone."""
    project, context = (getattr(module, name, None) or getattr(module, NAMES[name]) for name in NAMES)
    if isinstance(project, torch.nn.Conv2d):
        x = x.permute(0, 2, 3, 1)
    focal_weights = [level[0].weight for level in module.focal_layers]
    dim, levels = len(context.weight), len(focal_weights)
    weight = project.weight.flatten(1)
    _, ctx, gates = torch.nn.functional.linear(x, weight, project.bias).split([dim, dim, levels + 1], -1)
    # With the gate of one level at 1 and the others at 0, the aggregate is the context of that level.
    alone = torch.eye(levels + 1).expand(*gates.shape[:3], -1, -1)
    contexts = [reference.gated_aggregation(ctx, alone[..., level], focal_weights) for level in range(levels + 1)]
    agg = reference.gated_aggregation(ctx, gates, focal_weights, module.normalize_modulator)
    return gates, contexts, agg, torch.nn.functional.linear(agg, context.weight.flatten(1), context.bias)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def assert_maps_of_the_specification(model, images):
    found = inspect(model, images)
    seen = inputs_of(model, images)
    assert [maps.name for maps in found.maps] == list(seen)
    with torch.no_grad():
        for maps in found.maps:
            gates, contexts, agg, modulator = by_the_specification(model.get_submodule(maps.name), seen[maps.name])
            close(maps.gates, gates)
            assert len(maps.contexts) == len(contexts) == gates.shape[-1]
            for actual, expected in zip(maps.contexts, contexts, strict=True):
                close(actual.expand_as(expected), expected)
            close(maps.aggregated, agg)
            close(maps.modulator, modulator)
            close(maps.modulator_norm, modulator.norm(dim=-1))
    return found


@SOURCE
@pytest.mark.parametrize("made", [original, fast], ids=["as it comes", "patched"])
def test_maps_are_those_of_the_specification_level_by_level(source, made):
    found = assert_maps_of_the_specification(made(source), IMAGES)
    assert [(maps.stage, maps.block) for maps in found.maps] == [(0, 0), (1, 0)]
    assert [tuple(maps.gates.shape) for maps in found.maps] == [(2, 10, 14, 3), (2, 5, 7, 2)]


@pytest.mark.parametrize("patched", [False, True])
def test_maps_of_timm_itself(patched):
    with stubbed_torchvision():
        timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 8, "depths": (1, 2), "focal_levels": (2, 1), "focal_windows": (3, 5), "num_classes": 5}
    model = timm.models.focalnet.FocalNet(**sizes).eval()
    if patched:
        focalnet.patch(model)
    found = assert_maps_of_the_specification(model, IMAGES)
    assert [(maps.stage, maps.block) for maps in found.maps] == [(0, 0), (1, 0), (1, 1)]


def test_normalised_modulators_and_wide_kernels():
    layer = FocalModulation(6, 5, 3, normalize_modulator=True, use_post_layernorm_in_modulation=True).eval()
    found = assert_maps_of_the_specification(layer, torch.randn(2, 9, 7, 6))
    assert found.maps[0].name == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_have_the_dtype_of_the_model(dtype):
    model = original("focalnet").to(dtype)
    exact, found = inspect(original("focalnet"), IMAGES), inspect(model, IMAGES.to(dtype))
    assert found.maps[0].gates.dtype == found.maps[0].modulator.dtype == dtype
    step = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-6
    off = (found.maps[0].gates.double() - exact.maps[0].gates.double()).abs().max()
    assert off <= 8 * step * exact.maps[0].gates.abs().max()


@SOURCE
@pytest.mark.parametrize("made", [original, fast], ids=["as it comes", "patched"])
def test_the_model_and_its_results_stay_as_they_were(source, made):
    model = made(source)
    with torch.no_grad():
        before = model(IMAGES)
        found = inspect(model, IMAGES)
        after = model(IMAGES)
    assert torch.equal(after, before)
    torch.testing.assert_close(found.output, before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_hooks_are_removed_when_the_model_raises():
    model = original("focalnet")
    with pytest.raises(ValueError, match="pixel_values"):
        inspect(model, IMAGES[:, :2])
    assert not any(module._forward_hooks for module in model.modules())


def without_borders(model):
    """Of every depthwise kernel only the centre stays, so that nothing depends on the padding."""
    for name, parameter in model.named_parameters():
        if "focal_layers" in name:
            centre = parameter.shape[-1] // 2
            only = torch.zeros_like(parameter)
            only[..., centre, centre] = parameter.detach()[..., centre, centre]
            parameter.data = only
    return model


@SOURCE
def test_a_constant_image_has_constant_maps_wherever_the_padding_does_not_reach(source):
    constant = torch.full((1, 3, 64, 64), 0.3)
    first = inspect(original(source), constant).maps[0]
    for found, margin in [
        ([first], first.receptive_field[-2][0] // 2),
        (inspect(without_borders(original(source)), constant).maps, 0),
    ]:
        for maps in found:
            rows, columns = (slice(margin, size - margin) for size in maps.gates.shape[1:3])
            for each in (maps.modulator_norm[..., None], maps.aggregated, *maps.contexts[:-1]):
                inside = each[:, rows, columns]
                assert inside.numel()
                torch.testing.assert_close(inside, inside[:, :1, :1].expand_as(inside), rtol=1e-5, atol=1e-6)
    # Gates see no neighbours.
    torch.testing.assert_close(first.gates, first.gates[:, :1, :1].expand_as(first.gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window, levels", [(3, 1), (3, 3), (5, 2)])
def test_receptive_fields_are_where_a_context_changes_with_one_position(window, levels):
    layer = FocalModulation(4, window, levels).eval()
    x = torch.randn(1, 31, 31, 4)
    changed = x.clone()
    changed[0, 15, 15] += 1
    before, after = inspect(layer, x).maps[0], inspect(layer, changed).maps[0]
    for level in range(levels):
        moved = (before.contexts[level] != after.contexts[level]).any(-1)[0]
        extent = (moved.any(1).sum().item(), moved.any(0).sum().item())
        assert extent == before.receptive_field[level]
    assert before.receptive_field[levels] == (31, 31)


def test_trained_gates_tell_strokes_from_background_at_the_nearest_level_only():
    model = FocalNetForImageClassification.from_pretrained(shipped("digits")).eval()
    scans = load_digits().images[:300]
    # A position of the first stage is a pixel of a scan.
    pixels = torch.tensor(scans / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    pixels = torch.nn.functional.interpolate(pixels, 32, mode="bilinear")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels = (pixels - mean) / std
    gates = inspect(model, pixels, blocks=[(0, 0)]).maps[0].gates
    stroke, background = (torch.tensor(where) for where in (scans >= 8, scans <= 1))
    apart = (gates[stroke].mean(0) - gates[background].mean(0)) / gates.flatten(0, 2).std(0)
    assert apart[0] > 1  # by more than a standard deviation
    assert gates[..., 0][stroke].mean() > 0.3 and gates[..., 0][background].mean() < -0.3
    assert apart[1:].abs().max() < 0.3


def test_blocks_are_chosen_in_the_order_of_the_network():
    model = MAKE["focalnet"]()
    assert [maps.stage for maps in inspect(model, IMAGES, blocks="last").maps] == [0, 1]
    (only,) = inspect(model, IMAGES, blocks=[(-1, -1), (1, 0)]).maps
    assert (only.stage, only.block) == (1, 0)
    found = inspect(model, IMAGES)
    assert found.at(-1) is found.at(1, 0) is found.maps[1]
    with pytest.raises(ValueError, match=r"expected one of \(0, 0\), \(1, 0\), got \(0, 1\)"):
        found.at(0, 1)
    with pytest.raises(ValueError, match=r"got \(2, -1\)"):
        found.at(2)


@pytest.mark.parametrize("blocks", [[(2, 0)], [(0, 1)], [(-3, 0)], [], "first"])
def test_blocks_that_are_not_there_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks: expected"):
        inspect(MAKE["focalnet"](), IMAGES, blocks=blocks)


class Squashed(FocalModulation):
    """Other gates than those of focal modulation, with the same parts."""

    def _modulate(self, projected):
        q, ctx, gates = projected.split([self.dim, self.dim, self.focal_level + 1], -1)
        return self.projection_out(self._fused(q, ctx, gates.sigmoid()))


def test_what_cannot_be_inspected_is_refused_with_the_reason():
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match="expected a model with focal modulation"):
        inspect(torch.nn.Linear(2, 2), IMAGES)
    with refused(match=r"call model\.eval\(\)"):
        inspect(MAKE["focalnet"]().train(), IMAGES)
    with refused(match="something else than focal modulation: its output differs"):
        inspect(Squashed(4).eval(), torch.randn(1, 8, 8, 4))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        inspect("digits", IMAGES)
    idle = torch.nn.Sequential(torch.nn.Identity())
    idle.unused = torch.nn.Identity()
    idle.unused.add_module("inside", FocalModulation(4))
    idle.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"unused\.inside was not called"):
        inspect(idle.eval(), IMAGES)

"""torch.utils.flop_counter counts for our operators what it counts for others' modules."""

import itertools

import pytest
import torch
from small_models import EVERY_OPTION, SMALL, build, images, one_thread, theirs  # noqa: F401
from small_sources import SOURCE, fast, original
from torch.utils.flop_counter import FlopCounterMode

import focalnet
from focalnet.backends import extension
from focalnet.fusion import cpu_block
from focalnet.fusion.cpu_inference import Precision
from focalnet.models import patch_embeddings
from focalnet.models.layers import OURS
from focalnet.operators import norm_linear, norm_mlp

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=f"{extension.missing()}")


def flops_of(run, *arguments):
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def step(model, batch):
    outputs = model(batch)
    (outputs if isinstance(outputs, torch.Tensor) else outputs.logits).square().sum().backward()


FROZEN = [(), ("focal_layers",), ("projection_in", ".f."), ("stages.0", "layers.0", "embed", "stem")]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: " ".join(names) or "nothing frozen")
@SOURCE
def test_a_model_counts_what_it_does_unpatched(source, frozen):
    counts = []
    for make in (fast, original):
        model = make(source)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        with torch.no_grad():
            inference = flops_of(model, images(64, 96))
        counts.append((inference, flops_of(step, model.train(), images(64, 96))))
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


@pytest.mark.parametrize("fields", [SMALL, EVERY_OPTION], ids=["defaults", "every option"])
def test_our_model_counts_what_transformers_does_at_sizes_that_are_padded(fields):
    ours, theirs_ = build(focalnet, "FocalNetForImageClassification", fields), theirs(fields)
    assert flops_of(step, ours, images(61, 75)) == flops_of(step, theirs_, images(61, 75))


@needs_extension
def test_the_operators_of_cpu_inference_count_their_products():
    """By themselves: where a counter watches, a model calls its modules."""
    ours, theirs_ = build(focalnet, "FocalNetModel", SMALL), theirs(SMALL, "FocalNetModel")
    block, their_block = (model.encoder.stages[0].layers[0] for model in (ours, theirs_))
    stem, their_stem = ours.embeddings, theirs_.embeddings
    tokens, batch = torch.randn(2, 5, 6, 8), images(21, 30)
    with torch.no_grad():
        run = cpu_block.runner(block, OURS, tokens)
        expected = flops_of(their_block, tokens.flatten(1, 2), (5, 6))
        assert flops_of(run, tokens) == expected
        x = batch.permute(0, 2, 3, 1)
        call = patch_embeddings.call(stem.patch_embeddings, stem.norm, Precision(torch.float32, rounded=False), None)
        assert flops_of(patch_embeddings.run, x, call) == flops_of(their_stem, batch)


def wanted_gradients(count):
    """All, each alone, and all but each."""
    masks = [[True] * count, *([i == j for i in range(count)] for j in range(count))]
    return masks + [[i != j for i in range(count)] for j in range(count)]


def gradients_of(function, tensors, mask):
    leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, mask, strict=True)]
    return flops_of(lambda: function(*leaves).sum().backward())


def test_the_operators_of_a_norm_and_what_is_behind_it_count_the_products_that_each_gradient_needs():
    x, norm, w1, w2 = torch.randn(2, 5, 8), torch.ones(8), torch.randn(12, 8), torch.randn(8, 12)
    b1, b2 = torch.randn(12), torch.randn(8)
    cases = [
        (
            lambda x, g, s, w, b: torch.ops.focalnet.norm_linear(x, g, s, 1e-5, w, b),
            lambda x, g, s, w, b: norm_linear.composed(x, g, s, 1e-5, w, b),
            (x, norm, norm, w1, b1),
        ),
        (
            lambda x, g, s, w, b: torch.ops.focalnet.norm_linear(x, g, s, 1e-5, w, b, "reference", True),
            lambda x, g, s, w, b: norm_linear.composed(x, g, s, 1e-5, w, b),
            (x, norm, norm, w1, b1),
        ),
        (
            lambda x, g, s, *w: torch.ops.focalnet.norm_mlp(x, g, s, 1e-5, *w, None)[0],
            lambda x, g, s, *w: norm_mlp.composed(x, g, s, 1e-5, *w),
            (x, norm, norm, w1, b1, w2, b2),
        ),
    ]
    for operator, composed, tensors in cases:
        for mask in wanted_gradients(len(tensors)):
            assert gradients_of(operator, tensors, mask) == gradients_of(composed, tensors, mask), mask


@pytest.mark.parametrize("name", ["gated_aggregation", "focal_modulation", "packed_focal_modulation"])
def test_the_modulations_operators_count_the_products_that_each_gradient_needs(name):
    q, ctx, gates = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 6, 8), torch.randn(2, 5, 6, 3)
    kernels = [torch.randn(8, 1, 3, 3), torch.randn(8, 1, 5, 5)]
    tensors = (ctx, gates, *kernels, q, torch.randn(8, 8), torch.randn(8))

    def run(library, ctx, gates, first, second, q, weight, bias):
        if name == "gated_aggregation":
            return library.gated_aggregation(ctx, gates, [first, second]) * q.detach()
        if name == "packed_focal_modulation" and library is focalnet:
            projected = torch.cat([q, ctx, gates], -1)
            return torch.ops.focalnet.packed_focal_modulation(projected, [first, second], weight, bias, False, None)
        return library.focal_modulation(q, ctx, gates, [first, second], weight, bias)

    used = 4 if name == "gated_aggregation" else 7
    for mask in itertools.product([False, True], repeat=used):
        # The levels' kernels are asked for together.
        if mask[2] != mask[3] or not any(mask):
            continue
        # And so are the parts of a projection.
        if name == "packed_focal_modulation" and not mask[0] == mask[1] == mask[4]:
            continue
        mask = (*mask, *[False] * (7 - used))
        counts = [
            gradients_of(lambda *t, library=library: run(library, *t), tensors, mask)
            for library in (focalnet, focalnet.reference)
        ]
        assert counts[0] == counts[1], mask

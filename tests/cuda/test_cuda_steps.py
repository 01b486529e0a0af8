"""Focal modulation of the backend `cuda` around its kernels: what is called for a gradient, and where it is written.

No GPU is needed: the specification stands for the extension's operators.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from operands import SHAPES, operands
from torch.utils._python_dispatch import TorchDispatchMode

from focalnet import reference
from focalnet.backends import cuda, registry
from focalnet.operators.norm_linear import padded_empty

OPS = torch.ops.focalnet
COPIES = {"aten::cat", "aten::copy_", "aten::clone"}


def into(out, values):
    """``values`` in ``out``, without a copy that a test could take for one of the operator."""
    return torch.add(values, 0, out=out)


def aggregation_bwd(dagg, ctx, gates, focal_weights, normalize_modulator, tensor_cores, mask, dctx=None, dgates=None):
    need_ctx, need_gates, need_agg, need_focal = mask
    arguments = ctx, gates, focal_weights, normalize_modulator
    made = reference.gated_aggregation_bwd(dagg, *arguments, (need_ctx, need_gates, need_focal))
    agg = reference.gated_aggregation(*arguments) if need_agg else None
    gradients = [*made[:2], agg, *made[2:]]
    for place, out in enumerate((dctx, dgates)):
        if out is not None:
            into(out, gradients[place])
            gradients[place] = out.new_empty(0)
    return [ctx.new_empty(0) if one is None else one for one in gradients]


def planar_aggregation_bwd(dagg, ctx, *arguments):
    """Takes dagg as a matrix (C, B * H * W), and gives agg as one."""
    assert dagg.permute(3, 0, 1, 2).is_contiguous()
    dctx, dgates, agg, *dfocal_weights = aggregation_bwd(dagg, ctx, *arguments)
    if agg.numel():
        agg = into(agg.new_empty(agg.permute(3, 0, 1, 2).shape).permute(1, 2, 3, 0), agg)
    return [dctx, dgates, agg, *dfocal_weights]


STAND_INS = {
    "cuda_takes_planar_maps": lambda *_: False,
    "cuda_gated_aggregation": lambda *arguments: reference.gated_aggregation(*arguments[:4]),
    "cuda_gated_aggregation_bwd": aggregation_bwd,
    "cuda_modulate": lambda modulator, factor, out: torch.mul(modulator, factor, out=out),
    "cuda_modulate_bwd": lambda dout, q, need_sum: (
        dout * q,
        (dout * q).sum((0, 1, 2)) if need_sum else dout.new_empty(0),
    ),
}


PLANAR = {"cuda_takes_planar_maps": lambda *_: True, "cuda_gated_aggregation_bwd": planar_aggregation_bwd}


@pytest.fixture(params=[{}, PLANAR], ids=["channels last", "planar"])
def called(monkeypatch, request):
    """Counts the calls of the extension's operators, whose maps lie in either way."""
    counts = Counter()

    def counting(name, run):
        def counted(*arguments):
            counts[name] += 1
            return run(*arguments)

        return counted

    for name, run in (STAND_INS | request.param).items():
        monkeypatch.setattr(OPS, name, counting(name, run), raising=False)
    able = replace(registry._REGISTRY["cuda"], missing=lambda: None, accepts=lambda _: None)
    monkeypatch.setitem(registry._REGISTRY, "cuda", able)
    return counts


class Calls(TorchDispatchMode):
    """Counts PyTorch's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket._qualified_op_name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_one_aggregation_one_product_and_one_modulation(shape, called):
    arguments = operands(shape)
    out = OPS.focal_modulation(*arguments, shape.normalize, "cuda")
    torch.testing.assert_close(out, reference.focal_modulation(*arguments, shape.normalize))
    assert called == {"cuda_gated_aggregation": 1, "cuda_modulate": 1}


@pytest.mark.parametrize("mask", [*itertools.product((False, True), repeat=6)], ids=str)
def test_backward_computes_what_is_asked_for_and_nothing_twice(mask, called):
    """dmodulator unless dq alone is wanted; the modulator for dq alone; agg once, by whoever makes it."""
    arguments = operands(SHAPES[0])
    dout = torch.randn(arguments[0].shape)
    with Calls() as calls:
        made = cuda.focal_modulation_bwd(dout, *arguments, False, mask)
    expected = reference.focal_modulation_bwd(dout, *arguments, False, mask)
    for mine, wanted in zip(made, expected, strict=True):
        if wanted is None:
            assert mine is None or not mine.numel()
        else:
            torch.testing.assert_close(mine, wanted)
    need_q, need_ctx, need_gates, need_weight, need_bias, need_focal = mask
    through_agg = need_ctx or need_gates or need_focal
    assert called == Counter(
        cuda_modulate_bwd=through_agg or need_weight or need_bias,
        cuda_takes_planar_maps=through_agg,
        cuda_gated_aggregation_bwd=through_agg,
        cuda_gated_aggregation=not through_agg and (need_q or need_weight),
        cuda_modulate=need_q,
    )
    products = sum(calls.counts[name] for name in ("aten::mm", "aten::addmm"))
    assert products == through_agg + need_q + need_weight
    assert not calls.counts.keys() & {*COPIES, "aten::bmm"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_a_projection_is_written_in_place(shape, called):
    q, ctx, gates, *weights = operands(shape)
    rows = torch.cat([q, ctx, gates], -1)
    projected = padded_empty(rows, rows.shape).copy_(rows)
    call = (torch.randn(q.shape), projected, *weights, shape.normalize, [True] * 4)
    with Calls() as calls:
        made = OPS.packed_focal_modulation_bwd(*call, "cuda")
    for mine, expected in zip(made, OPS.packed_focal_modulation_bwd(*call, "reference"), strict=True):
        torch.testing.assert_close(mine, expected)
    operators = "cuda_modulate_bwd", "cuda_takes_planar_maps", "cuda_gated_aggregation_bwd", "cuda_modulate"
    assert called == dict.fromkeys(operators, 1)
    assert not calls.counts.keys() & COPIES

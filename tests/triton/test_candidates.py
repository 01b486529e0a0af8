"""The plans that tuning tries give the numbers of the plan of the table."""

import itertools

import pytest
import torch
from operands import Shape, operands

from focalnet.backends import triton_plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["focal_modulation", "focal_modulation_bwd"])
def test_plans_that_tuning_tries_agree_with_that_of_the_table(operator):
    q, ctx, gates, focal_weights, weight, bias = operands(Shape(2, 6, 20, 16, (3, 5)), torch.float32, DEVICE)
    given = {"ctx": ctx, "gates": gates, "w0": focal_weights[0], "w1": focal_weights[1]}
    given |= {"q": q, "weight": weight, "bias": bias}
    mask = ()
    if operator.endswith("_bwd"):
        given, mask = given | {"dout": torch.ones_like(q)}, (True,) * 6
    given = {name: tensor.detach() for name, tensor in given.items()}
    tried = list(itertools.islice(triton_plans.candidates(operator, given, mask), 4))
    assert len({config for config, _ in tried}) == 4
    expected, *others = (run() for _, run in tried)
    assert "out" in expected or "dctx" in expected
    for made in others:
        for name, tensor in expected.items():
            torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5)

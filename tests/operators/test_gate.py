"""The gate of fused operators: a question about a module is asked again exactly where something that it may have read
has changed, and what it returns are the parameters of now."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from focalnet.backends import extension
from focalnet.fusion.gate import while_unchanged, why_not_fused

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def a_module():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GELU(), nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5))).eval()


@pytest.fixture
def asked():
    """(the question, a list with an entry for each time that it is really asked)"""
    times = []

    @while_unchanged
    def parameters(module, *settings):
        times.append(settings)
        conv, _, (norm, _) = module
        return [[conv.weight, conv.bias], norm.weight, norm.bias, norm.eps]

    return parameters, times


def test_what_is_returned_are_the_parameters_of_now(asked):
    question, times = asked
    module = a_module()
    question(module)
    module[0].weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    module[2][0].bias.data = torch.ones(8)
    (weight, bias), norm_weight, norm_bias, eps = question(module)
    assert weight is module[0].weight and bias is module[0].bias
    assert norm_weight is module[2][0].weight and norm_bias is module[2][0].bias and eps == 1e-5
    assert len(times) == 1


def replaced(module):
    module[1] = nn.ReLU()


def renamed(module):
    module[2]._modules = {"norm": module[2][0], "1": module[2][1]}


def appended(module):
    module[2].append(nn.Identity())


def subclassed(module):
    class Norm(nn.LayerNorm):
        pass

    module[2][0].__class__ = Norm


CHANGES = {
    "a number": lambda m: setattr(m[2][0], "eps", 1e-3),
    "a tuple": lambda m: setattr(m[0], "padding", (1, 1)),
    "a string": lambda m: setattr(m[1], "approximate", "tanh"),
    "a new attribute": lambda m: setattr(m[1], "extra", 1),
    "training mode of a part": lambda m: m[2][1].train(),
    "a part": replaced,
    "a name": renamed,
    "one part more": appended,
    "a class": subclassed,
    "a part that is None": lambda m: m[2]._modules.update({"1": None}),
    "a forward hook": lambda m: m[1].register_forward_hook(lambda *_: None),
    "a forward pre-hook": lambda m: m[1].register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda m: m[1].register_full_backward_hook(lambda *_: None),
    "a backward pre-hook": lambda m: m[1].register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m[1], "forward", lambda x: x),
    "a buffer": lambda m: m[1].register_buffer("seen", torch.zeros(1)),
    "a dtype": lambda m: m[0].double(),
    "a dtype through .data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.double()),
    "a layout": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().to_sparse())),
    "a device": lambda m: m[2][0].to("meta"),
    "no bias": lambda m: m[0].register_parameter("bias", None),
    "a tensor in the place of a parameter": lambda m: m[0]._parameters.update(weight=m[0].weight.detach()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, asked):
    question, times = asked
    module = a_module()
    for _ in range(2):
        question(module)
    assert len(times) == 1
    change(module)
    for _ in range(2):
        try:
            question(module)
        except (TypeError, AttributeError, ValueError):  # of the question, which takes the parts for what they were
            times.append("raised")
    assert len(times) > 1


def test_undoing_a_change_needs_no_new_question(asked):
    question, times = asked
    module = a_module()
    question(module)
    handle = module[1].register_forward_hook(lambda *_: None)
    handle.remove()
    module.train()
    module.eval()
    question(module)
    assert len(times) == 1


def test_settings_count(asked):
    question, times = asked
    module = a_module()
    for settings in ((torch.float32, None), (torch.float32, None), (torch.float32, "cpu"), (torch.bfloat16, "cpu")):
        question(module, *settings)
    assert times == [(torch.float32, None), (torch.float32, "cpu"), (torch.bfloat16, "cpu")]


def test_the_keywords_of_a_bound_forward_count(asked):
    question, times = asked
    module = a_module()
    for backend in ("cpu", "cpu", "reference"):
        module[1].forward = functools.partial(nn.functional.gelu, approximate=backend)
        question(module)
    assert len(times) == 2


def test_a_tensor_that_two_parts_share_is_asked_for_every_time():
    times = []

    @while_unchanged
    def weights(module):
        times.append(1)
        return [module[0].weight, module[1].weight]

    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    weights(module)
    module[1].weight = nn.Parameter(torch.zeros(3, 3))
    assert weights(module)[1] is module[1].weight
    assert len(times) == 2


def test_a_reason_is_asked_for_every_time():
    times = []
    question = while_unchanged(lambda module: times.append(1) or "no")
    module = a_module()
    assert [question(module), question(module)] == ["no", "no"] and len(times) == 2


def test_an_answer_without_parameters_is_kept_as_it_is():
    question = while_unchanged(lambda module: {"wide": len(module)})
    module = a_module()
    assert question(module) == question(module) == {"wide": 3}


def test_copies_have_answers_of_their_own(asked):
    question, _ = asked
    module = a_module()
    question(module)
    twin = copy.deepcopy(module)
    assert question(twin)[1] is twin[2][0].weight
    assert question(module)[1] is module[2][0].weight


def test_an_answer_does_not_keep_its_module_alive(asked):
    question, _ = asked
    module = a_module()
    module[1].__dict__["owner"] = module  # a cycle
    question(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear(3), nn.Identity(), torch.jit.script(nn.ReLU())], ids=["lazy", "empty", "script"]
)
def test_any_module_can_be_asked_about(lazy):
    question = while_unchanged(lambda module: [1])
    assert question(nn.Sequential(lazy)) == question(nn.Sequential(lazy)) == [1]


def test_a_module_that_is_a_part_of_itself_can_be_asked_about(asked):
    question, times = asked
    module = a_module()
    module[1].owner = module
    for _ in range(2):
        assert question(module)[1] is module[2][0].weight
    assert len(times) == 2


def test_who_watches_a_call_is_named():
    assert why_not_fused(torch.ones(1)) is None
    assert why_not_fused("images") == "expected a plain tensor, got str"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why_not_fused(torch.ones(1)) == "there are hooks on all modules"
    finally:
        handle.remove()
    seen = []
    torch.func.vmap(lambda x: seen.append(why_not_fused(torch.ones(1))) or x)(torch.ones(2))
    assert seen == ["the call is being transformed"]

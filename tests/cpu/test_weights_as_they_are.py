"""A result is that of the weights as they are when the call is made, however they came to be so.

Every way there is to write a parameter, on our models, patched ones and compiled ones, each after a call that could
have left something behind; and weights that are written, models that change mode and patches that come and go while
other threads infer.
"""

import copy
import ctypes
import functools
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import build, images, one_thread  # noqa: F401
from small_sources import FIELDS, SOURCE, Logits, fast
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import focalnet

FACTOR = 1.25
ONE_BLOCK = FIELDS | {"depths": [1], "focal_levels": [2], "focal_windows": [3]}


def new_values(model):
    """Every parameter's next value; norms and biases move too."""
    return {name: FACTOR * p.detach() + 0.01 for name, p in model.named_parameters()}


def each(model, write):
    for name, value in new_values(model).items():
        write(model.get_parameter(name), value)


def in_place(model):
    with torch.no_grad():
        each(model, lambda p, value: p.copy_(value))


def through_data(model):
    """torch_ema's average_parameters, mean teachers, nn.utils.vector_to_parameters."""
    each(model, lambda p, value: p.data.copy_(value))


def data_replaced(model):
    def write(p, value):
        p.data = value

    each(model, write)


def through_set(model):
    with torch.no_grad():
        each(model, lambda p, value: p.set_(value))


def through_detach(model):
    each(model, lambda p, value: p.detach().copy_(value))


def through_storage(model):
    each(model, lambda p, value: p.untyped_storage().copy_(value.contiguous().untyped_storage()))


def through_numpy(model):
    def write(p, value):
        p.detach().numpy()[...] = value.numpy()

    each(model, write)


def through_a_pointer(model):
    each(model, lambda p, value: ctypes.memmove(p.data_ptr(), value.contiguous().data_ptr(), p.nbytes))


def by_another_process(model):
    """As Hogwild training and parameter servers on one machine do."""
    values = new_values(model)
    model.share_memory()
    with torch.no_grad():
        model(images())
    shared = mmap.mmap(-1, 1)
    if (child := os.fork()) == 0:
        for name, p in model.named_parameters():
            p.detach().numpy()[...] = values[name].numpy()
        shared[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert shared[0] == 1


def parameters_replaced(model):
    for name, value in new_values(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def loaded(model):
    model.load_state_dict(new_values(model), strict=False)


def loaded_by_assigning(model):
    model.load_state_dict(new_values(model), strict=False, assign=True)


def swapped(model):
    each(model, lambda p, value: torch.utils.swap_tensors(p, nn.Parameter(value)))


def by_optimizer(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model(images()).square().mean().backward()
    optimizer.step()


def by_averaging(model):
    """AveragedModel holds a copy, which it writes; here the copy's values come back through .data."""
    average = AveragedModel(copy.deepcopy(model))
    in_place(average.module)
    for p, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data = averaged.data


def rounded(model):
    model.bfloat16().float()


def with_a_parametrization(model):
    class Scaled(nn.Module):
        def forward(self, weight):
            return FACTOR * weight

    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(module, "weight", Scaled())


def with_weight_norm(model):
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parametrizations.weight_norm(module)
            with torch.no_grad():
                module.parametrizations.weight.original0.mul_(FACTOR)


def with_weights_pruned(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(module, "weight", amount=0.5)


def with_a_subclass(model):
    """As quantisation libraries keep weights: a subclass that stands for numbers which it does not hold."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight = nn.Parameter(Doubled(module.weight.detach()))


class Doubled(torch.Tensor):
    """Stands for twice the numbers that it holds."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (nn.functional.linear, torch.conv2d):
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(2 * a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args), **kwargs or {})


def with_sparse_weights(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter((module.weight * (module.weight > 0)).detach().to_sparse_csr())


CHANGES = [in_place, through_data, data_replaced, through_set, through_detach, through_storage, through_numpy]
CHANGES += [through_a_pointer, by_another_process, parameters_replaced, loaded, loaded_by_assigning, swapped]
CHANGES += [by_optimizer, functools.partial(by_optimizer, foreach=True), functools.partial(by_optimizer, fused=True)]
OTHER_MODULES = [with_a_parametrization, with_weight_norm, with_weights_pruned, with_a_subclass, with_sparse_weights]
CHANGES += [by_averaging, rounded, *OTHER_MODULES]


def name_of(change):
    if isinstance(change, functools.partial):
        return f"{change.func.__name__}, {next(iter(change.keywords))}"
    return change.__name__


CHANGE = pytest.mark.parametrize("change", CHANGES, ids=name_of)


def by_reference(model, x):
    """What the same weights give in the original's own code, or in ours on the specification's operators."""
    was_patched = focalnet.unpatch(model)
    with torch.no_grad(), focalnet.use_backend("reference"):
        result = model(x)
    if was_patched:
        focalnet.patch(model)
    return result


def assert_is_of(model, result, x, before):
    expected = by_reference(model, x)
    largest = expected.abs().max()
    assert (result - expected).abs().max() <= 1e-5 * largest
    assert (result - before).abs().max() > 1e-4 * largest


@SOURCE
@CHANGE
def test_weights_count_however_they_are_written(source, change):
    model, x = fast(source), images()
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        assert_is_of(model, model(x), x, before)


@pytest.fixture
def fresh_dynamo():
    """What was compiled before counts towards dynamo's limit, beyond which it compiles no more."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["focalnet", "transformers"])
@torch._dynamo.config.patch(recompile_limit=len(CHANGES))
def test_a_compiled_models_weights_count_however_they_are_written(source, fresh_dynamo):
    """One after the other: each way starts from a graph that ran on the weights before."""
    model, x = fast(source), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for change in CHANGES:
        if change not in OTHER_MODULES:
            # On a copy: a patch that is taken off and put on again would have the model compiled anew.
            assert_follows(model, compiled, change, x, compare_with=copy.deepcopy)


@pytest.mark.slow
@pytest.mark.parametrize("change", [with_a_parametrization, with_weight_norm, with_weights_pruned], ids=name_of)
def test_a_compiled_models_modules_may_compute_their_weights(change, fresh_dynamo):
    model = Logits(build(focalnet, "FocalNetForImageClassification", ONE_BLOCK)).eval()
    assert_follows(model, torch.compile(model, backend="aot_eager"), change, images())


def assert_follows(model, compiled, change, x, compare_with=lambda model: model):
    with torch.no_grad():
        before = compiled(x)
    change(model)
    with torch.no_grad():
        assert_is_of(compare_with(model), compiled(x), x, before)


@SOURCE
def test_functional_call_uses_the_weights_that_it_is_given(source):
    model, x = fast(source), images()
    with torch.no_grad():
        before = model(x)
        given = torch.func.functional_call(model, new_values(model), (x,))
        assert torch.equal(model(x), before)
    in_place(model)
    assert_is_of(model, given, x, before)


@SOURCE
def test_models_made_in_inference_mode_run_the_same_operators(source):
    with torch.inference_mode():
        inside, x = fast(source), images()
        result = inside(x)
    with torch.no_grad():
        assert torch.equal(fast(source)(x.clone()), result)


@pytest.mark.slow
@pytest.mark.parametrize("fold", range(3))
def test_compiled_models_one_after_the_other_in_one_process(fold, fresh_dynamo):
    """As a cross-validation makes them, with torch._dynamo.reset() between."""
    for source in ("focalnet", "transformers"):
        model, x = fast(source), images()
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            before = compiled(x)
        model.train()
        by_optimizer(model)
        model.eval()
        with torch.no_grad():
            assert_is_of(model, compiled(x), x, before)


class Writers:
    """Who writes weights says so before and after: an answer counts if nobody wrote while it was made."""

    def __init__(self, model):
        self.model = model
        self.lock = threading.Lock()
        self.edits = 0  # odd while a write goes on
        self.versions = [{name: p.detach().clone() for name, p in model.named_parameters()}, new_values(model)]

    def write(self, turn):
        with self.lock:
            self.edits += 1
            self.model.load_state_dict(self.versions[turn % 2], strict=False)
            self.edits += 1
            return self.edits // 2


@pytest.mark.slow
@SOURCE
def test_requests_while_other_threads_change_the_model(source):
    """eval(), train(), load_state_dict, patch and unpatch between requests: no exception, no answer of no weights."""
    model, x = fast(source), images(batch=1)
    inner, writers = model.model, Writers(model)
    expected = []
    for version in (0, 1):
        writers.write(version)
        expected.append(by_reference(model, x))
    deadline, checked = time.monotonic() + 2, []

    def request(_):
        while time.monotonic() < deadline:
            edits = writers.edits
            with torch.inference_mode():
                answer = model(x)
            if edits % 2 == 0 and writers.edits == edits:
                right = expected[(edits // 2 - 1) % 2]
                assert (answer - right).abs().max() <= 1e-5 * right.abs().max()
                checked.append(1)

    def change(_):
        turn = 0
        while time.monotonic() < deadline:
            model.eval()
            model.train()
            writers.write(turn)
            turn += 1
            model.eval()
            if source != "focalnet":
                focalnet.unpatch(inner)
                focalnet.patch(inner)
            time.sleep(0.02)

    with ThreadPoolExecutor(18) as pool:
        list(pool.map(lambda task: task(None), [*[request] * 16, change, lambda _: model.eval()]))
    assert len(checked) > 16


@SOURCE
def test_requests_that_put_the_model_into_evaluation_mode_first(source):
    """As most tutorials' request handlers do, from several threads at once."""
    model, x = fast(source), images(batch=1)
    expected = by_reference(model, x)

    def request(_):
        model.eval()
        with torch.inference_mode():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(request, range(200)):
            assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()

"""What is done to whole models, ours and patched ones: distributed wrapping, checkpointing, torch.func, quantisation,
autocast. docs/compatibility.md lists what this file proves.
"""

import functools
import os
import tempfile

import pytest
import torch
import torch.multiprocessing
from small_models import assert_equal, images, one_thread  # noqa: F401
from small_sources import PATCHED, SOURCE, fast, original
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import gradients, train

# --- distributed: two processes, each with one image of a batch of two


@pytest.fixture(scope="module")
def distributed_results():
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(train, (folder,), nprocs=2)
        yield torch.load(f"{folder}/results.pt")


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@SOURCE
def test_gradients_of_two_processes_are_the_mean_of_their_images(source, wrapper, distributed_results):
    actual = distributed_results[source, wrapper]
    expected = {name: gradient / 2 for name, gradient in gradients(original(source), images()).items()}
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * largest, name


@SOURCE
def test_a_sharded_model_infers(source, distributed_results):
    with torch.no_grad():
        assert_equal(distributed_results[source, "inference"]["logits"], original(source)(images()))


# --- checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@SOURCE
def test_activation_checkpointing_gives_the_same_gradients(source, use_reentrant):
    model, expected = fast(source), gradients(original(source), images())
    calls = []
    for block in [m for m in model.modules() if hasattr(m, "modulation")]:
        block.modulation.register_forward_hook(lambda *_: calls.append(1))
        _checkpoint(block, use_reentrant)
    actual = gradients(model, images().requires_grad_())
    assert len(calls) == 4  # two blocks, each computed again
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


def _checkpoint(block, use_reentrant):
    forward = block.forward
    block.forward = lambda *args: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=use_reentrant)


def test_gradient_checkpointing_of_transformers_stays_switchable():
    model, expected = fast("transformers"), gradients(original("transformers"), images())
    model.model.train()
    model.model.gradient_checkpointing_enable()
    actual = gradients(model, images())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


# --- torch.func


@SOURCE
def test_torch_func_transforms_patched_models(source):
    def loss_of(model):
        def loss(parameters, image):
            return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

        return loss

    batch = images()
    results = []
    for model in (fast(source), original(source)):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        per_image = torch.func.vmap(torch.func.grad(loss_of(model)), (None, 0))(parameters, batch)
        _, tangent = torch.func.jvp(model, (batch,), (torch.ones_like(batch),))
        results.append([tangent, *(per_image[name] for name in sorted(per_image))])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


# --- quantisation


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("source", ["focalnet", "transformers", "authors"])  # timm's are convolutions
def test_linear_layers_can_be_quantised_before_and_after_patching(source, when):
    import focalnet

    def quantised(model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    if when == "after":
        model = quantised(fast(source))
    else:
        model = quantised(original(source))
        if source != "focalnet":
            report = focalnet.patch(model)
            kinds = [entry.kind for entry in report.entries if entry.reason is None]
            assert kinds.count("modulation") == 2 and "block" not in kinds  # blocks with int8 weights run by modules
    expected = quantised(original(source))
    modulation = next(m for m in model.modules() if hasattr(m, "focal_layers"))
    first = next(iter(getattr(modulation, n) for n in ("f", "projection_in") if hasattr(modulation, n)))
    assert isinstance(first, torch.ao.nn.quantized.dynamic.Linear)
    with torch.no_grad():
        assert_equal(model(images()), expected(images()))


# --- autocast


class Casts(TorchDispatchMode):
    """Sizes of the low-precision tensors that were copied to float32."""

    def __init__(self):
        super().__init__()
        self.to_float32 = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.dtype == torch.float32:
            self.to_float32.append(args[0].numel())
        return output


def note_dtype(seen, name, module, args, output):
    seen[name] = getattr(output, "dtype", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@PATCHED
def test_autocast_gives_the_dtypes_of_the_original_and_no_more_float32_copies(source, dtype):
    outputs, casts, grads = [], [], []
    for model in (fast(source), original(source)):
        seen = {}
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(note_dtype, seen, name))
        with Casts() as mode:
            with torch.autocast("cpu", dtype):
                loss = model(images(64, 64)).float().square().sum()
            loss.backward()
        outputs.append({n: d for n, d in seen.items() if n.endswith((".modulation", "mlp", ""))})
        casts.append(sum(mode.to_float32))
        grads.append({p.grad.dtype for p in model.parameters() if p.grad is not None})
    common = outputs[0].keys() & outputs[1].keys()
    assert {n: outputs[0][n] for n in common} == {n: outputs[1][n] for n in common}
    assert any(d is dtype for d in outputs[0].values())
    assert grads == [{torch.float32}] * 2
    assert casts[0] <= casts[1]

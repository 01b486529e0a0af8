"""focalnet.patch on whole blocks: one operator in inference, and their modules wherever that would not be the same."""

import copy
import functools

import pytest
import torch
from golden import MODELS
from small_models import (
    EVERY_OPTION,
    assert_equal,
    images,
    modulations,
    one_thread,  # noqa: F401
    tensors,
    theirs,
)
from sources import AuthorsBlock, AuthorsModulation, XDecoderBlock, golden_model
from torch import nn

import focalnet
from focalnet.backends import extension, registry

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=f"{extension.missing()}")
BLOCKS = {
    "transformers": theirs,
    "transformers, every option": lambda: theirs({**EVERY_OPTION, "hidden_act": "gelu"}),
    **{name: functools.partial(golden_model, name) for name in MODELS},
}


@pytest.fixture
def fused(monkeypatch):
    """One entry for every block that ran as one operator."""
    calls, operator = [], registry._REGISTRY["cpu"].operators["block"]
    counting = lambda *arguments: calls.append(1) or operator(*arguments)  # noqa: E731
    monkeypatch.setitem(registry._REGISTRY["cpu"].operators, "block", counting)
    return calls


def blocks(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "modulation") and hasattr(m, "mlp")}


@needs_extension
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_blocks_run_as_one_operator_in_inference_and_by_their_modules_elsewhere(make, fused):
    original = make()
    patched = copy.deepcopy(original)
    report = focalnet.patch(patched)
    replaced = {entry.name for entry in report.entries if entry.kind != "patch embeddings"}
    assert set(blocks(patched)) | set(modulations(patched)) == replaced and not report.left
    fused.clear()  # of the trials
    size = (64, 96)
    with torch.no_grad():
        assert_equal(patched(images(*size)), original(images(*size)))
    assert len(fused) == len(blocks(patched))

    patched(images(*size))  # gradients
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        patched(images(*size))
    with torch.no_grad(), focalnet.use_backend("reference"):
        assert_equal(patched(images(*size)), original(images(*size)))
    with torch.no_grad():
        patched.train()(images(*size))
        patched.eval().double()(images(*size).double())
    assert len(fused) == len(blocks(patched))


@needs_extension
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_blocks_run_as_one_operator_in_bfloat16(make, fused):
    """The error against float64 is at most twice that of the modules, plus one unit in the last place."""
    original = make().bfloat16()
    patched, exact = copy.deepcopy(original), copy.deepcopy(original).double()
    focalnet.patch(patched)
    fused.clear()  # of the trials
    pixel_values = images(64, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, modules = tensors(patched(pixel_values)), tensors(original(pixel_values))
        doubles = tensors(exact(pixel_values.double()))
    assert len(fused) == len(blocks(patched)) > 0
    for found, theirs_found, expected in zip(ours, modules, doubles, strict=True):
        assert found.dtype == theirs_found.dtype
        ulp = torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert (found - expected).abs().max() <= 2 * (theirs_found - expected).abs().max() + ulp


class ReversedNorm(AuthorsBlock):
    """The parts of a block, and another order."""

    def forward(self, x):
        return super().forward(self.norm1(x))


class OtherBlocks:
    def more_parts():
        return XDecoderBlock(8, AuthorsModulation(8))

    def other_order():
        return ReversedNorm(8, AuthorsModulation(8))

    def other_activation():
        block = AuthorsBlock(8, AuthorsModulation(8))
        block.mlp.act = nn.ReLU()
        return block

    def other_scale():
        block = AuthorsBlock(8, AuthorsModulation(8))
        block.gamma_1 = 0.5
        return block


@needs_extension
@pytest.mark.parametrize(
    "make, reason",
    [
        (OtherBlocks.more_parts, "it also has dw1, dw2"),
        (OtherBlocks.other_order, "its own forward computes something else"),
        (OtherBlocks.other_activation, "mlp.act is ReLU"),
        (OtherBlocks.other_scale, "gamma_1 and gamma_2 are numbers other than 1"),
    ],
)
def test_a_block_of_another_make_keeps_its_forward_and_its_modulation_is_patched(make, reason):
    original = make().eval()
    original.H, original.W = 5, 6
    patched = copy.deepcopy(original)
    report = focalnet.patch(patched)
    assert report.replaced == ("modulation",) and reason in report.left[""]
    x = torch.randn(2, 30, 8)
    with torch.no_grad():
        assert_equal(patched(x), original(x))


@needs_extension
def test_what_changes_in_a_patched_block_counts_at_the_next_call():
    original, patched = golden_model("ms_large_fl4_norm"), golden_model("ms_large_fl4_norm")
    focalnet.patch(patched)

    def scaled(model):
        for block in blocks(model).values():
            block.gamma_1.mul_(2)

    def not_normalised(model):
        for module in modulations(model).values():
            module.normalize_modulator = False

    def hooked(model):
        for block in blocks(model).values():
            block.modulation.register_forward_hook(lambda *args: 2 * args[2])

    def replaced(model):
        for block in blocks(model).values():
            block.mlp.act = nn.ReLU()

    with torch.no_grad():
        before = patched(images(64, 64))
        for change in (scaled, not_normalised, hooked, replaced):
            for model in (original, patched):
                change(model)
            after = patched(images(64, 64))
            assert_equal(after, original(images(64, 64)))
            assert (after - before).abs().max() > 1e-4
            before = after


@needs_extension
def test_weights_written_through_data_count_after_a_training_step_or_another_patch():
    model = golden_model("ms_srf")
    focalnet.patch(model)
    with torch.no_grad():
        before = model(images())
    for renew in (lambda: model.train()(images()), lambda: focalnet.patch(model)):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        renew()
        original = copy.deepcopy(model.eval())
        focalnet.unpatch(original)
        with torch.no_grad():
            after = model(images())
            assert_equal(after, original(images()))
        assert (after - before).abs().max() > 1e-3
        before = after


@needs_extension
def test_keeping_the_modulator_keeps_blocks_as_they_are():
    model = golden_model("ms_srf")
    focalnet.patch(model)
    report = focalnet.patch(model, keep_modulator=True)
    assert set(report.replaced) == set(modulations(model)) and set(report.left) == set(blocks(model))
    with torch.no_grad():
        model(images())
    assert all(hasattr(module, "modulator") for module in modulations(model).values())


@needs_extension
@pytest.mark.parametrize("settings", [{"backend": "reference"}, {"keep_modulator": True}], ids=str)
def test_what_is_asked_of_a_modulation_alone_is_done_inside_a_patched_block(settings, fused):
    model = BLOCKS["transformers"]()
    focalnet.patch(model)
    block = next(iter(blocks(model).values()))
    with torch.no_grad():
        fused.clear()  # of the trials
        model(images(32, 32))
        assert len(fused) == len(blocks(model))
        focalnet.patch(block.modulation, **settings)
        fused.clear()
        model(images(32, 32))
    assert len(fused) == len(blocks(model)) - 1
    assert ("modulator" in block.modulation.__dict__) == ("keep_modulator" in settings)


class DependsOnLayout(nn.Conv2d):
    """A convolution whose results depend on the memory format of the images, as oneDNN's may by rounding."""

    by = 0.0

    def forward(self, images):
        is_contiguous = images.is_contiguous()
        return super().forward(images) * (1.0 if is_contiguous else 1.0 + self.by)


@pytest.mark.parametrize(("by", "patched"), [(1e-6, True), (1e-2, False)], ids=["rounding", "another function"])
def test_patch_embeddings_are_patched_whatever_the_rounding_of_their_convolution(by, patched, monkeypatch):
    monkeypatch.setattr(DependsOnLayout, "by", by)
    model = theirs()
    model.focalnet.embeddings.patch_embeddings.projection.__class__ = DependsOnLayout
    replaced = {entry.name for entry in focalnet.patch(model).entries if entry.kind == "patch embeddings"}
    assert ("focalnet.embeddings.patch_embeddings" in replaced) == patched

"""The model tests that transformers runs on each of its vision models, run on focalnet's four classes.

They come with transformers' source distribution: `make test` fetches it. FOCALNET_COMMON_TESTS_ON=transformers runs
the same tests on transformers' own FocalNet.
"""

import contextlib
import copy
import os
import re
import unittest

import pytest
import torch
import transformers
from small_models import one_thread  # noqa: F401
from transformers_testing import FOLDER, load_common_tests, registered_auto_classes

import focalnet

if (common_tests := load_common_tests()) is None:
    pytest.skip(
        f"transformers' common model tests are not in {FOLDER}: `make test` fetches them, if there is a network",
        allow_module_level=True,
    )
modeling, backbone, configuration = common_tests

LIBRARY = {"focalnet": focalnet, "transformers": transformers}[os.environ.get("FOCALNET_COMMON_TESTS_ON", "focalnet")]

# Common tests that say nothing about a FocalNet: no test here passes for transformers' own FocalNet either
# (test_what_is_left_out_does_not_pass_for_transformers_own_focalnet).
NOT_APPLICABLE = {
    r"attention_outputs|attn_implementation_composite|sdpa_|flash_attn|eager_matches_sdpa|set_attention_dynamically"
    r"|sliding_window_mask|flex_attention": "FocalNet has no attention",
    r"inputs_embeds|resize_(embeddings|tokens_embeddings|position_vector_embeddings)|model_get_set_embeddings"
    r"|enable_input_require_grads_with_gradient_checkpointing": "the stem is a convolution of pixels, no nn.Embedding",
    r"loss_honors_shift_labels|loss_no_double_shift": "no language modeling head",
    r"rope": "no position embeddings",
    r"moe_|router_logits|eager_matches_batched_and_grouped": "no experts",
    r"tp_plan": "no tensor-parallel plan",
    r"keep_in_fp32": "no module needs float32 in a half-precision model",
    r"reverse_loading_mapping|already_mapped_keys": "checkpoints hold the names of the parameters, nothing is renamed",
    r"capture_outputs_decorator|capture_specific_layers": "hidden states, one a stage, are collected by the encoder",
    r"subconfig_are_same": "no configuration inside another",
}


def reason_to_leave_out(test):
    return next((reason for pattern, reason in NOT_APPLICABLE.items() if re.search(pattern, test)), None)


def left_out(test_case):
    return [name for name in unittest.TestLoader().getTestCaseNames(test_case) if reason_to_leave_out(name)]


class FocalNetModelTester:
    """A small model with every optional part, and inputs for it; the attributes are what common tests read."""

    is_training = True
    batch_size = 3
    image_size = 16
    patch_size = 2
    seq_length = (image_size // patch_size) ** 2
    hidden_size = 8
    num_hidden_layers = 2
    num_labels = 10

    def __init__(self, library):
        self.library = library

    def get_config(self):
        return self.library.FocalNetConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.hidden_size,
            hidden_sizes=[2 * self.hidden_size, 2 * self.hidden_size],
            depths=[1, 2],
            focal_levels=[2, 1],
            focal_windows=[3, 5],
            hidden_dropout_prob=0.1,
            drop_path_rate=0.1,
            use_layerscale=True,
            layerscale_value=0.5,
            use_post_layernorm_in_modulation=True,
            normalize_modulator=True,
            encoder_stride=4,
            out_features=["stage1", "stage2"],
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=modeling.torch_device)
        return self.get_config(), {"pixel_values": images}


@pytest.fixture(scope="class")
def auto_classes():
    with registered_auto_classes() if LIBRARY is focalnet else contextlib.nullcontext():
        yield


def weighted_sum(outputs):
    """One number that depends on every value of a model's outputs; a plain sum would be blind behind a LayerNorm."""
    tensors = outputs.feature_maps if "feature_maps" in outputs else outputs.to_tuple()
    weights = [torch.linspace(-1, 1, tensor.numel(), device=tensor.device).view_as(tensor) for tensor in tensors]
    return sum((tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True))


class CommonModelTests(modeling.ModelTesterMixin):
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    library = LIBRARY

    def setUp(self):
        self.model_tester = FocalNetModelTester(self.library)
        self.all_model_classes = (
            self.library.FocalNetModel,
            self.library.FocalNetForImageClassification,
            self.library.FocalNetForMaskedImageModeling,
            self.library.FocalNetBackbone,
        )

    def models_and_inputs(self, return_labels=False, **fields):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config = type(config)(**{**config.to_diff_dict(), **fields})
        for model_class in self.all_model_classes:
            torch.manual_seed(0)
            model = model_class(copy.deepcopy(config)).to(modeling.torch_device).eval()
            yield model, self._prepare_for_class(inputs, model_class, return_labels=return_labels)


@pytest.mark.usefixtures("auto_classes")
class TestFocalNetModels(CommonModelTests, unittest.TestCase):
    def skipTest(self, reason):
        self.fail(f"a common test left itself out, and NOT_APPLICABLE does not say why: {reason}")

    def test_config(self):
        tester = configuration.ConfigTester(
            self,
            config_class=LIBRARY.FocalNetConfig,
            has_text_modality=False,
            common_properties=["image_size", "patch_size", "num_channels", "embed_dim", "hidden_sizes"],
            embed_dim=37,
        )
        tester.run_common_tests()

    def test_output_shapes(self):
        shapes = {
            "FocalNetModel": {"last_hidden_state": (3, 16, 16), "pooler_output": (3, 16)},
            "FocalNetForImageClassification": {"logits": (3, 10)},
            "FocalNetForMaskedImageModeling": {"reconstruction": (3, 3, 16, 16)},
            "FocalNetBackbone": {"feature_maps": [(3, 16, 4, 4), (3, 16, 4, 4)]},
        }
        for model, inputs in self.models_and_inputs():
            outputs = model(**inputs)
            for name, shape in shapes[type(model).__name__].items():
                actual = outputs[name]
                actual = [*(x.shape for x in actual)] if isinstance(actual, tuple) else actual.shape
                self.assertEqual(actual, shape, f"{type(model).__name__}: {name}")

    def test_get_input_embeddings_is_the_stem(self):
        for model, _ in self.models_and_inputs():
            self.assertIs(model.get_input_embeddings(), model.base_model.get_input_embeddings())
            self.assertIsInstance(model.get_input_embeddings().projection, torch.nn.Conv2d)
            self.assertIsNone(model.get_output_embeddings())

    def test_torch_compile_for_training(self):
        # transformers' test of this name has the inputs of a language model. Tracing, the graph of the backward and
        # its partition are shown for all; generated code keeps a C++ compiler busy, so it is shown for one block.
        for model, inputs in self.models_and_inputs(return_labels=True, depths=[1, 1]):
            with self.subTest(type(model).__name__):
                self.check_compiled_training(model, inputs, backend="aot_eager")

    def test_torch_compile_for_training_with_generated_code(self):
        one_block = {"depths": [1], "focal_levels": [2], "focal_windows": [3], "out_features": ["stage1"]}
        for model, inputs in self.models_and_inputs(return_labels=True, **one_block, out_indices=None):
            if isinstance(model, LIBRARY.FocalNetForImageClassification):
                self.check_compiled_training(model, inputs, backend="inductor")

    def check_compiled_training(self, model, inputs, backend):
        expected = weighted_sum(model(**inputs))
        expected.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        actual = weighted_sum(torch.compile(model, fullgraph=True, backend=backend)(**inputs))
        actual.backward()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
        self.assertEqual(gradients.keys(), {name for name, p in model.named_parameters() if p.grad is not None})
        bound = 1e-5 * max(gradient.abs().max().item() for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=bound)

    def test_torch_export(self):
        for model, inputs in self.models_and_inputs(depths=[1, 1]):
            with self.subTest(type(model).__name__), torch.no_grad():
                exported = torch.export.export(model, (), kwargs=inputs).module()
                torch.testing.assert_close(exported(**inputs).to_tuple(), model(**inputs).to_tuple())


for test in left_out(TestFocalNetModels):
    setattr(TestFocalNetModels, test, None)


@pytest.mark.usefixtures("auto_classes")
class TestFocalNetBackbone(backbone.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LIBRARY.FocalNetBackbone,)
    config_class = LIBRARY.FocalNetConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = FocalNetModelTester(LIBRARY)


class TransformersOwnFocalNet(CommonModelTests, unittest.TestCase):
    __test__ = False
    library = transformers


def passes_for_transformers_own_focalnet(test):
    result = unittest.TestResult()
    TransformersOwnFocalNet(test).run(result)
    return not (result.skipped or result.failures or result.errors)


def test_what_is_left_out_does_not_pass_for_transformers_own_focalnet():
    assert passes_for_transformers_own_focalnet("test_save_load")
    assert [test for test in left_out(TransformersOwnFocalNet) if passes_for_transformers_own_focalnet(test)] == []

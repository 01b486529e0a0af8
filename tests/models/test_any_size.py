"""What is exported or traced at one size is right at every other, also where images are padded to whole patches."""

import os

import onnxruntime
import openvino
import pytest
import torch
from small_models import SMALL, assert_equal, build, images, one_thread, tensors  # noqa: F401
from small_sources import seeded
from sources import AuthorsFocalNet
from torch.export import Dim

import focalnet

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = (64, 96)
# Every remainder by the stem's 4, and those of the maps behind it; more and less than the example; not square.
SIZES = [EXAMPLE, (96, 80), (61, 75), (62, 73), (63, 74), (35, 97), (100, 49), (33, 34)]
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
OVERLAPPING = {"use_conv_embed": True}
TINY = SMALL | {
    "depths": [1, 1],
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
    "encoder_stride": 8,
    "out_features": ["stem", "stage1", "stage2"],
}


def patched(model):
    assert not focalnet.patch(model).left
    return model


def transformers_model():
    import transformers

    return patched(build(transformers, "FocalNetForImageClassification", TINY))


def detection_backbone():
    fields = {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}
    return patched(seeded(lambda: AuthorsFocalNet(**fields, detection=True)))


def ours(name, **fields):
    return lambda: build(focalnet, name, TINY | fields)


needs_openvino = pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="OpenVINO breaks under ONEDNN_MAX_CPU_ISA, which its own oneDNN reads: unpatched transformers models"
    ' fail too ("Convolution node ... is not initialized", or a crash)',
)
MODELS = {
    "classifier": ours("FocalNetForImageClassification"),
    "classifier, overlapping": ours("FocalNetForImageClassification", **OVERLAPPING),
    "classifier, padded to twice the stride": ours("FocalNetForImageClassification", **OVERLAPPING, patch_size=8),
    "classifier, incomplete patches dropped": ours("FocalNetForImageClassification", drop_incomplete_patches=True),
    "masked image modelling": ours("FocalNetForMaskedImageModeling"),
    "backbone": ours("FocalNetBackbone"),
    "backbone, maps before downsampling": ours("FocalNetBackbone", feature_maps_before_downsampling=True),
    "patched, transformers": transformers_model,
    "patched, authors' detection": detection_backbone,
}
MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
# Those whose graphs differ in what happens to sizes: an export to ONNX takes seconds.
KINDS = ["classifier", "classifier, padded to twice the stride", "masked image modelling", "patched, transformers"]
KIND = pytest.mark.parametrize("make", [MODELS[name] for name in KINDS], ids=KINDS)


class Tensors(torch.nn.Module):
    """Images to the tensors of the outputs, a flat tuple."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(tensors(self.model(images)))


def assert_right_at_every_size(run, model, sizes=SIZES, first_batch=1):
    for batch, size in enumerate(sizes, start=first_batch):
        with torch.no_grad():
            actual, expected = run(images(*size, batch=batch)), model(images(*size, batch=batch))
        assert [x.shape for x in actual] == [x.shape for x in expected], size
        for x, y in zip(actual, expected, strict=True):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max(), size


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]


def in_openvino(converted):
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


@MODEL
def test_exported_programs(make):
    model = Tensors(make()).eval()
    program = torch.export.export(model, (images(*EXAMPLE),), dynamic_shapes={"images": DYNAMIC})
    assert "focalnet.focal_modulation" in str(program.graph)
    assert_right_at_every_size(program.module(), model)


@MODEL
def test_traced_modules(make):
    model = Tensors(make()).eval()
    assert_right_at_every_size(torch.jit.trace(model, images(*EXAMPLE)), model)


@KIND
def test_onnx(make, tmp_path):
    model = Tensors(make()).eval()
    arguments = {"dynamo": True, "dynamic_shapes": {"images": DYNAMIC}, "verbose": False}
    program = torch.onnx.export(model, (images(*EXAMPLE),), **arguments)
    assert {node.domain for node in program.model.graph} == {""}, "standard operators only"
    program.save(tmp_path / "model.onnx")
    # The last map has one row, or one column, for which torch.export would make another program.
    assert_right_at_every_size(in_onnxruntime(tmp_path / "model.onnx"), model, [*SIZES, (8, 8), (5, 41)])


@KIND
def test_onnx_by_the_older_exporter(make, tmp_path):
    model = Tensors(make()).eval()
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(*EXAMPLE),), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    assert_right_at_every_size(in_onnxruntime(path), model)


@KIND
@needs_openvino
def test_openvino_converts_a_model_directly(make):
    model = Tensors(make()).eval()
    assert_right_at_every_size(in_openvino(openvino.convert_model(model, example_input=images(*EXAMPLE))), model)


@needs_openvino
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_program_exported_on_the_reference_backend_has_plain_operators_which_openvino_converts(strict):
    modulation = focalnet.FocalModulation(3).eval()
    example = torch.randn(1, 8, 9, 3)
    with focalnet.use_backend("reference"):
        program = torch.export.export(modulation, (example,), strict=strict)
    assert "focalnet" not in str(program.graph)
    with torch.no_grad():
        assert_equal(in_openvino(openvino.convert_model(program))(example), [modulation(example)])


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_named_dimensions_have_a_range(strict):
    """The last map, of stride 8, has at least two rows: torch.export makes programs for one row of their own."""
    model = Tensors(MODELS["classifier"]()).eval()

    def export(**limits):
        dimensions = {0: Dim("b"), 2: Dim("h", **limits), 3: Dim("w", **limits)}
        return torch.export.export(model, (images(*EXAMPLE),), dynamic_shapes={"images": dimensions}, strict=strict)

    program = export(min=9)
    assert sorted(str(limits) for limits in program.range_constraints.values())[1:] == ["VR[9, int_oo]"] * 2
    assert_right_at_every_size(program.module(), model)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        assert_right_at_every_size(export(min=1).module(), model, [*SIZES, (5, 3)], first_batch=2)
    with pytest.raises(torch._dynamo.exc.UserError, match=r"Suggested fixes:\n\s+h = Dim\('h', min=9\)"):
        export()


def test_the_mask_of_a_program_may_be_of_any_size_with_the_image():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = MODELS["masked image modelling"]()

        def forward(self, images, mask):
            outputs = self.model(images, mask)
            return outputs.loss, outputs.reconstruction

    def arguments(height, width):
        patches = -(-height // 4) * -(-width // 4)
        return images(height, width), torch.arange(2 * patches).view(2, patches) % 3 == 0

    model, size = Loss(), {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shapes = {"images": size, "mask": {1: Dim.DYNAMIC}}
    program = torch.export.export(model, arguments(*EXAMPLE), dynamic_shapes=shapes).module()
    for height, width in SIZES:
        assert_equal(program(*arguments(height, width)), model(*arguments(height, width)))


def test_one_compiled_graph_serves_every_size():
    torch._dynamo.reset()
    model = Tensors(MODELS["masked image modelling"]()).eval()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    assert_right_at_every_size(torch.compile(model, backend=count, dynamic=True, fullgraph=True), model, SIZES[1:])
    assert len(graphs) <= 2  # one more, for the batch of one
    torch._dynamo.reset()

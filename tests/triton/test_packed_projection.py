"""The Triton kernels on a padded projection: what they read is aligned, and they write one packed gradient."""

from dataclasses import replace

import pytest
import torch
from focalnet.kernels import focal_modulation, launch_table
from focalnet.kernels.launch_table import LevelConfig
from focalnet.kernels.level_launch import alignment
from focalnet.kernels.padding import ROW_ELEMENTS
from focalnet.kernels.plan import H100, Case
from operands import Shape, operands
from rule import assert_same_numbers
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet
from focalnet import reference
from focalnet.backends import triton as triton_backend
from focalnet.backends import triton_plans
from focalnet.fusion import gpu_block
from focalnet.models.layers import OURS, FocalNetLayer
from focalnet.operators.norm_linear import padded_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SENTINEL = 7.0
GRADIENTS = ("dq", "dctx", "dgates")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """As in test_gated_aggregation.py."""
    monkeypatch.setattr(launch_table, "LEVELS", ((1 << 30, LevelConfig(16, 16, rows=2, back_rows=2, step=4)),))
    monkeypatch.setattr(launch_table, "WHOLE_PLANE_ROWS", 4)
    monkeypatch.setattr(triton_backend, "_plans", {})


def on_device(arguments, dtype):
    return [[w.to(DEVICE, dtype) for w in a] if isinstance(a, list) else a.to(DEVICE, dtype) for a in arguments]


def a_packed_gradient(like, shape):
    """All of its elements, padding included, and the parts of its rows that a backend is given."""
    channels, levels = shape.channels, len(shape.kernels)
    rows = padded_empty(like, (*like.shape[:-1], 2 * channels + levels + 1))
    whole = rows.as_strided((*rows.shape[:-1], rows.stride(-2)), rows.stride()).fill_(SENTINEL)
    return whole, rows.split([channels, channels, levels + 1], dim=-1)


SHAPES = [
    Shape(batch=2, height=3, width=4, channels=20, kernels=(3, 3, 5), normalize=True, name="three levels"),
    Shape(batch=1, height=7, width=3, kernels=(3, 5), name="streaming over rows"),
    Shape(batch=1, height=2, width=3, channels=13, kernels=(3,), name="odd channels"),
    Shape(batch=3, height=1, width=1, channels=1, kernels=(1,), name="1x1 map, one channel"),
]


def references(shape, dtype, dout):
    """The gradients of the specification in ``dtype`` and, of the same numbers, in float64, on the CPU."""
    arguments = [
        [w.to(dtype) for w in a] if isinstance(a, list) else a.to(dtype) for a in operands(shape, torch.float32)
    ]
    exact = [[w.double() for w in a] if isinstance(a, list) else a.double() for a in arguments]
    return [
        reference.focal_modulation_bwd(dout.to("cpu", given[0].dtype), *given, shape.normalize, (True,) * 6)
        for given in (arguments, exact)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_write_into_the_packed_gradient_what_they_make_otherwise_and_nothing_beside_it(shape, dtype):
    arguments = on_device(operands(shape), dtype)
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    call = (dout, *arguments, shape.normalize, (True,) * 6)
    expected = triton_backend.focal_modulation_bwd(*call)
    low, exact = references(shape, dtype, dout)
    whole, parts = a_packed_gradient(dout, shape)
    for _ in range(2):  # a first run compiles, a second one runs what was kept
        made = triton_backend.focal_modulation_bwd(*call, out=parts)
        assert all(gradient is part for gradient, part in zip(made, parts, strict=False))
        for position, numbers in enumerate(zip(made, expected, low, exact, strict=True)):
            assert_same_numbers(f"gradient {position}", *numbers)
        assert (whole[..., sum(part.shape[-1] for part in parts) :] == SENTINEL).all()
        whole[..., : sum(part.shape[-1] for part in parts)] = SENTINEL


def test_every_chunk_of_images_writes_its_own_rows():
    shape = Shape(batch=3, height=4, width=4, kernels=(3,))
    q, ctx, gates, focal_weights, weight, bias = on_device(operands(shape), torch.float32)
    given = {"q": q, "ctx": ctx, "gates": gates, "w0": focal_weights[0], "weight": weight, "bias": bias}
    given["dout"] = torch.ones_like(q, memory_format=torch.contiguous_format)
    pitch = q.stride(-2)
    case = Case(3, 4, 4, 8, ((3, 3),), torch.float32, False, pitch, pitch, pitch, True, (True,) * 6)
    config = replace(launch_table.level_config(4, 4, 8, (3,), torch.float32), chunks=3)
    expected = focal_modulation.backward_plan(case, H100, config).run(given, q.device)
    low, exact = references(shape, torch.float32, given["dout"])
    whole, parts = a_packed_gradient(q, shape)
    packed = replace(case, gradient_pitch=whole.shape[-1])
    chunks = focal_modulation.backward_plan(packed, H100, config)
    assert sum(launch.name == "gated_aggregation_bwd_kernel" for launch in chunks.launches) == 3
    chunks.run(given | dict(zip(GRADIENTS, parts, strict=True)), q.device)
    for name, part, *others in zip(GRADIENTS, parts, low[:3], exact[:3], strict=True):
        assert_same_numbers(name, part, expected[name], *others)


def test_models_pad_to_what_plans_of_a_padded_projection_say():
    for channels, kernels in ((96, (3, 5, 7)), (96, (3, 5)), (192, (3, 5, 7, 9)), (24, (3,))):
        rows = padded_empty(torch.empty(0), (1, 1, 1, 2 * channels + len(kernels) + 1))
        assert Case.packed(1, 1, 1, channels, kernels, torch.bfloat16).q_pitch == rows.stride(-2)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_kernels_load_and_store_16_bytes_at_a_time_on_what_a_module_gives_them(levels, training, monkeypatch):
    cases, addresses = [], []
    make = triton_plans.make

    def recording(operator, tensors, *rest):
        addresses.extend(tensors[name].data_ptr() for name in triton_backend._IMAGES if name in tensors)
        cases.append(triton_plans._case(tensors, False, ()))
        return make(operator, tensors, *rest)

    monkeypatch.setattr(triton_plans, "make", recording)
    module = focalnet.FocalModulation(24, 1, levels, 0, backend="triton").to(DEVICE, torch.bfloat16)
    with torch.set_grad_enabled(training):
        out = module(torch.randn(1, 2, 3, 24, device=DEVICE, dtype=torch.bfloat16))
    if training:
        out.sum().backward()
    assert len(cases) == 1 + training
    assert not any(address % 16 for address in addresses)
    for case in cases:
        pitches = (case.ctx_pitch, case.gates_pitch, case.q_pitch, case.dctx_pitch)
        assert [alignment(pitch, torch.bfloat16) for pitch in pitches] == [8] * 4
    assert cases[-1].gradient_pitch == (64 if training else 0)


class Calls(TorchDispatchMode):
    """Notes the operators that are called, and the arguments and results of this package's."""

    def __init__(self):
        super().__init__()
        self.names, self.ours = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        self.names.add(name)
        if name.startswith("focalnet::"):
            self.ours[name] = args, result
        return result


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_concatenates_and_copies_nothing_on_the_way_back_to_its_projection(post_norm):
    fields = {"embed_dim": 16, "depths": [1], "focal_levels": [2], "focal_windows": [3]}
    config = focalnet.FocalNetConfig(**fields, use_post_layernorm=post_norm)
    block = FocalNetLayer(config, stage=0, drop_path=0.0).train().to(DEVICE)
    x = torch.randn(1, 2, 3, 16, device=DEVICE, requires_grad=True)
    with focalnet.use_backend("triton"):
        assert not isinstance(gpu_block.runner(block, OURS, x), str)
        out = block(x)
        leaves = [x, *block.parameters()]
        with Calls() as calls:
            gradients = torch.autograd.grad(out.square().sum(), leaves)
    _, (dprojected, *_) = calls.ours["focalnet::packed_focal_modulation_bwd"]
    (dout, *_), _ = calls.ours["focalnet::norm_linear_bwd"]
    assert dout.data_ptr() == dprojected.data_ptr() and dout.stride(-2) % ROW_ELEMENTS == 0
    assert not calls.names & {"aten::cat", "aten::clone", "aten::copy_"}
    with focalnet.use_backend("reference"):
        expected = torch.autograd.grad(block(x).square().sum(), leaves)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_torch_compile_keeps_one_graph_with_the_packed_operator():
    module = focalnet.FocalModulation(8, 3, 1, backend="triton").to(DEVICE)
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=keep)
    results = []
    for run in (compiled, torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        out = run(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    assert "packed_focal_modulation" in graphs[0]
    for made in results[:2]:
        for mine, expected in zip(made, results[2], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)

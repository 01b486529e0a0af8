"""The runtimes that can run a FocalNet. Each is a function from a case to a callable that takes images.

All runtimes get weights from the same seed, initialised as in transformers. `worker` runs each in its own process.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .torchvision_stub import stubbed_torchvision

Placed = TypeVar("Placed", torch.Tensor, torch.nn.Module)


@dataclass(frozen=True)
class Case:
    """A published variant with image and batch size; ``device`` is "cpu" or "cuda", ``dtype`` "float32", ...

    Inference has weights and images of the dtype. Training has float32 ones, and autocast to the dtype.
    """

    variant: str
    size: int
    batch: int
    training: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    def images(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.placed(torch.randn(self.batch, 3, self.size, self.size, generator=generator))

    def placed(self, what: Placed) -> Placed:
        """Move a tensor or a model to the device and the dtype of the case's weights."""
        return what.to(self.device, self.weights_dtype)

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.training else getattr(torch, self.dtype)

    def autocast(self) -> torch.autocast:
        """The context of a training step's forward pass."""
        return torch.autocast(self.device, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Models built in this context have the case's weights from the start, never float32 ones beside."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.weights_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


MakeModel = Callable[[Case], torch.nn.Module]
Start = Callable[[Case], Callable[..., Any]]  # returns a callable that takes images


def config_fields(case: Case) -> dict[str, Any]:
    from ..variants import VARIANTS

    return {"normalize_modulator": False, **VARIANTS[case.variant].config_fields()}


def theirs(case: Case) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    with case.building():
        model = transformers.FocalNetForImageClassification(transformers.FocalNetConfig(**config_fields(case)))
    return case.placed(model.train(case.training))


def ours(case: Case) -> torch.nn.Module:
    import focalnet

    torch.manual_seed(0)
    with case.building():
        model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig(**config_fields(case)))
    return case.placed(model.train(case.training))


def stepping(model: torch.nn.Module, case: Case) -> Callable[..., Any]:
    """A callable from images to logits. For a model in training mode it also takes a step of SGD."""
    if not model.training:
        return torch.inference_mode()(lambda images: model(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(images: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with case.autocast():
            output = model(images)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        logits.float().square().mean().backward()
        optimizer.step()
        return logits

    return step


def timm_model(case: Case) -> torch.nn.Module:
    with stubbed_torchvision():
        import timm

    torch.manual_seed(0)
    with case.building():
        model = timm.create_model(f"focalnet_{case.variant}")
    return case.placed(model.train(case.training))


def _patched(make: MakeModel) -> MakeModel:
    def patched(case: Case) -> torch.nn.Module:
        import focalnet

        model = make(case)
        focalnet.patch(model)
        return model

    return patched


def _reference(case: Case) -> torch.nn.Module:
    os.environ["FOCALNET_BACKEND"] = "reference"
    return ours(case)


def eager(make: MakeModel) -> Start:
    return lambda case: stepping(make(case), case)


def compiled(make: MakeModel, mode: str = "default") -> Start:
    return lambda case: stepping(torch.compile(make(case), mode=mode), case)


def channels_last(how: Callable[[MakeModel], Start], make: MakeModel) -> Start:
    """``how(make)`` with weights and images in the channels-last memory format."""

    def start(case: Case) -> Callable[..., Any]:
        run = how(lambda case: make(case).to(memory_format=torch.channels_last))(case)
        return lambda images: run(images.contiguous(memory_format=torch.channels_last))

    return start


def onnxruntime(case: Case, path: str | None = None) -> Callable[..., Any]:
    """``path``: an ONNX file that replaces that of the case."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path or _onnx(case), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def onnxruntime_int8(case: Case) -> Callable[..., Any]:
    """ONNX Runtime's dynamic quantisation: weights in int8, activations quantised in every call."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "int8.onnx"))
        quantize_dynamic(_onnx(case), path)
        return onnxruntime(case, path)


def openvino(case: Case, precision: str | None = "f32") -> Callable[..., Any]:
    """OpenVINO on float32 images. ``precision`` None is its default: bfloat16 where the processor supports it."""
    import openvino as ov

    return openvino_model(ov.Core().read_model(_onnx(replace(case, dtype="float32"))), precision)


def openvino_model(model: Any, precision: str | None) -> Callable[..., Any]:
    """A callable that runs an ``openvino.Model`` with an input ``images``."""
    import openvino as ov

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = ov.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer({"images": _float_array(images)})


def _float_array(images: torch.Tensor) -> Any:
    """``images``, float32 or bfloat16, as a float32 array. Not by torch, whose threads would spin on."""
    if images.dtype == torch.float32:
        return images.numpy()
    return (images.view(torch.int16).numpy().astype("int32") << 16).view("float32")


def openvino_int8(case: Case) -> Callable[..., Any]:
    """OpenVINO after NNCF's post-training quantisation: weights and activations in int8, calibrated on 16 batches."""
    import nncf
    import openvino as ov

    batches = nncf.Dataset([{"images": case.images(1000 + seed).numpy()} for seed in range(16)])
    # Not ModelType.TRANSFORMER: bench/int8.py finds that the digits model then gets most digits wrong.
    return openvino_model(nncf.quantize(ov.Core().read_model(_onnx(case)), batches, subset_size=16), None)


max_autotuned = functools.partial(compiled, mode="max-autotune")

RUNTIMES: dict[str, Start] = {
    "focalnet": eager(ours),
    "focalnet, compile": compiled(ours),
    "focalnet, max-autotune": max_autotuned(ours),
    "focalnet, reference": eager(_reference),
    "focalnet, reference, compile": compiled(_reference),
    "focalnet, reference, max-autotune": max_autotuned(_reference),
    "transformers": eager(theirs),
    "transformers, compile": compiled(theirs),
    "transformers, max-autotune": max_autotuned(theirs),
    "transformers, patched": eager(_patched(theirs)),
    "timm": eager(timm_model),
    "timm, compile": compiled(timm_model),
    "timm, max-autotune": max_autotuned(timm_model),
    "timm, channels-last": channels_last(eager, timm_model),
    "timm, channels-last, compile": channels_last(compiled, timm_model),
    "timm, channels-last, max-autotune": channels_last(max_autotuned, timm_model),
    "timm, patched": eager(_patched(timm_model)),
    "onnxruntime": onnxruntime,
    "onnxruntime, int8": onnxruntime_int8,
    "openvino": openvino,
    "openvino, default": functools.partial(openvino, precision=None),
    "openvino, int8": openvino_int8,
}
# Runtimes of float32 ONNX files on a CPU. OpenVINO in its default precision is compared with bfloat16 models too.
INFERENCE_ON_A_CPU = ("onnxruntime", "onnxruntime, int8", "openvino", "openvino, default", "openvino, int8")


def load_libraries(name: str, start: Start, case: Case) -> None:
    """Import what a runtime needs, so that its memory is not taken for the model's, by building a model on meta."""
    if name in INFERENCE_ON_A_CPU:
        importlib.import_module(name.partition(",")[0])
        return
    with torch.device("meta"):
        start(replace(case, device="meta"))


def able(case: Case) -> list[str]:
    """The runtimes that can run a case if they are installed."""
    on_cpu = not case.training and case.device == "cpu"
    dtypes = dict.fromkeys(INFERENCE_ON_A_CPU, ("float32",)) | {"openvino, default": ("float32", "bfloat16")}
    return [name for name in RUNTIMES if name not in dtypes or (on_cpu and case.dtype in dtypes[name])]


def unasked(case: Case) -> list[str]:
    """The default runtimes for a case: `able` without int8 and without max-autotune, which takes minutes to start."""
    return [name for name in able(case) if not name.endswith(("max-autotune", "int8"))]


def flops_per_image(case: Case, make: MakeModel = theirs) -> int:
    """FLOPs of the convolutions and matrix products of a forward pass; a multiply-add counts as two.

    They are counted on meta tensors, without computation.
    """
    from torch.utils.flop_counter import FlopCounterMode

    one = replace(case, batch=1, training=False, device="meta", dtype="float32")
    with torch.device("meta"):
        model = make(one)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, case.size, case.size, device="meta"))
    return counter.get_total_flops()


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images, return_dict=False)[0]


def _onnx(case: Case) -> str:
    """Path of transformers' model as an ONNX file with fixed shapes. The file is made once and shared by runtimes."""
    path = Path(tempfile.gettempdir(), f"focalnet-bench-{case.variant}-{case.size}-{case.batch}.onnx")
    if not path.exists():
        unfinished = path.with_suffix(".part.onnx")
        program = torch.onnx.export(
            _Logits(theirs(case)), (case.images(0),), input_names=["images"], dynamo=True, verbose=False
        )
        program.save(unfinished, external_data=False)
        unfinished.rename(path)
    return str(path)

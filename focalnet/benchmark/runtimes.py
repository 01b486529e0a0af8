"""What can run a FocalNet: each runtime as a function from a case to a call that takes images.

Every runtime gets the same seeded weights, as transformers initialises them. `worker` gives each its own process.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Placed = TypeVar("Placed", torch.Tensor, torch.nn.Module)


@dataclass(frozen=True)
class Case:
    """A published variant at an image size and a batch; ``device`` is "cpu" or "cuda", ``dtype`` "float32", ..."""

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
        """A tensor or a model on the device and in the dtype of the case."""
        return what.to(self.device, getattr(torch, self.dtype))


def config_fields(case: Case) -> dict:
    from ..variants import VARIANTS

    return {"normalize_modulator": False, **VARIANTS[case.variant].config_fields()}


def theirs(case: Case) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    model = transformers.FocalNetForImageClassification(transformers.FocalNetConfig(**config_fields(case)))
    return case.placed(model.train(case.training))


def ours(case: Case) -> torch.nn.Module:
    import focalnet

    torch.manual_seed(0)
    model = focalnet.FocalNetForImageClassification(focalnet.FocalNetConfig(**config_fields(case)))
    return case.placed(model.train(case.training))


def stepping(model: torch.nn.Module) -> Callable:
    """Logits; while training, a step of SGD on a loss of them."""
    if not model.training:
        return torch.inference_mode()(lambda images: model(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(images: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        output = model(images)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        logits.square().mean().backward()
        optimizer.step()
        return logits

    return step


def focalnet_eager(case: Case) -> Callable:
    return stepping(ours(case))


def focalnet_reference(case: Case) -> Callable:
    os.environ["FOCALNET_BACKEND"] = "reference"
    return stepping(ours(case))


def focalnet_compile(case: Case) -> Callable:
    return stepping(torch.compile(ours(case)))


def transformers_eager(case: Case) -> Callable:
    return stepping(theirs(case))


def transformers_compile(case: Case) -> Callable:
    return stepping(torch.compile(theirs(case)))


def timm_model(case: Case) -> torch.nn.Module:
    _stub_torchvision()
    import timm

    torch.manual_seed(0)
    return case.placed(timm.create_model(f"focalnet_{case.variant}").train(case.training))


def timm_eager(case: Case) -> Callable:
    return stepping(timm_model(case))


def transformers_patched(case: Case) -> Callable:
    return stepping(_patched(theirs(case)))


def timm_patched(case: Case) -> Callable:
    return stepping(_patched(timm_model(case)))


def _patched(model: torch.nn.Module) -> torch.nn.Module:
    import focalnet

    focalnet.patch(model)
    return model


def timm_channels_last_compile(case: Case) -> Callable:
    run = stepping(torch.compile(timm_model(case).to(memory_format=torch.channels_last)))
    return lambda images: run(images.contiguous(memory_format=torch.channels_last))


def onnxruntime(case: Case) -> Callable:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(_onnx(case), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def openvino(case: Case) -> Callable:
    import openvino as ov

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(_onnx(case), "CPU", {"PERFORMANCE_HINT": "LATENCY", **threads})
    request = compiled.create_infer_request()
    return lambda images: request.infer({"images": images.numpy()})


RUNTIMES: dict[str, Callable[[Case], Callable]] = {
    "focalnet": focalnet_eager,
    "focalnet, compile": focalnet_compile,
    "focalnet, reference": focalnet_reference,
    "transformers": transformers_eager,
    "transformers, compile": transformers_compile,
    "transformers, patched": transformers_patched,
    "timm": timm_eager,
    "timm, patched": timm_patched,
    "timm, channels-last, compile": timm_channels_last_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
FLOAT32_INFERENCE_ON_A_CPU = ("onnxruntime", "openvino")


def able(case: Case) -> list[str]:
    """The runtimes that can run a case where they are installed."""
    everything = not case.training and case.device == "cpu" and case.dtype == "float32"
    return [name for name in RUNTIMES if everything or name not in FLOAT32_INFERENCE_ON_A_CPU]


def flops_per_image(case: Case) -> int:
    """Of convolutions and matrix products in a forward pass, counted on transformers' model."""
    from torch.utils.flop_counter import FlopCounterMode

    one = Case(case.variant, case.size, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(one)(one.images(0))
    return counter.get_total_flops()


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images, return_dict=False)[0]


def _onnx(case: Case) -> str:
    """transformers' model as an ONNX file of this very shape, made once for all runtimes that want it."""
    path = Path(tempfile.gettempdir(), f"focalnet-bench-{case.variant}-{case.size}-{case.batch}.onnx")
    if not path.exists():
        unfinished = path.with_suffix(".part.onnx")
        program = torch.onnx.export(
            _Logits(theirs(case)), (case.images(0),), input_names=["images"], dynamo=True, verbose=False
        )
        program.save(unfinished, external_data=False)
        unfinished.rename(path)
    return str(path)


def _stub_torchvision() -> None:
    """timm imports torchvision for its data pipelines, and there is no CPU build to install: an empty one does."""
    if importlib.util.find_spec("torchvision") is not None:
        return

    class Named(type):
        """A class whose attributes are their own names, as an enumeration's would do."""

        def __getattr__(cls, name: str) -> str:
            if name.startswith("__"):
                raise AttributeError(name)
            return name

    class Anything(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return Named(name, (), {"__init__": lambda self, *a, **k: None})

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            if name.partition(".")[0] == "torchvision":
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
            return Anything(spec.name)

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    sys.meta_path.append(Finder())

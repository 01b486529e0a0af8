"""Training scripts' files: the tensors are read, nothing else is built; and which of the weights are taken."""

import argparse
import collections
import enum
import os
import pathlib
import random
import sys
import types

import numpy as np
import pytest
import torch
from command_line import offline_and_undone, run
from model_files import SETTLED, SMALL, assert_same_bits, message_of, named, randomized

from focalnet import FocalNetConfig, FocalNetForImageClassification, convert_checkpoint, load_checkpoint
from focalnet.checkpoints.files import read_tensors


def weights(seed=0):
    torch.manual_seed(seed)
    return named(randomized(FocalNetForImageClassification(FocalNetConfig(**SMALL))), "authors")


class Exploding:
    """Its classes may not be built while a file is read: they are only there to be written."""

    armed = False

    def __new__(cls, *args, **kwargs):
        assert not Exploding.armed, f"{cls.__name__} was built"
        return super().__new__(cls, *args, **kwargs)

    def __setstate__(self, state):
        raise AssertionError(f"the state of {type(self).__name__} was set")


class CfgNode(Exploding, dict):
    """yacs', and mmcv's ConfigDict: a dict that is filled through SETITEMS, and has attributes."""


class ListConfig(Exploding, list):
    """OmegaConf's or a tracked list: filled through APPENDS."""


class Slotted(Exploding):
    __slots__ = ("a",)


class Choice(enum.Enum):
    ONE = 1


def with_attributes(cls, *args):
    made = cls(*args)
    made.__dict__["frozen"] = True
    return made


def slotted():
    made = Slotted()
    made.a = 1
    return made


def parameter_with_attributes():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.owner = argparse.Namespace(a=1)
    return parameter


BESIDE = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("out"), nested=argparse.Namespace()),
    "CfgNode": with_attributes(CfgNode, {"MODEL": CfgNode({"NAME": "x"})}),
    "ListConfig": with_attributes(ListConfig, [1, 2]),
    "slots": slotted(),
    "numpy scalar": {"best": np.float64(0.8), "epoch": np.int64(3)},
    "numpy array": np.arange(3.0),
    "random states": {"python": random.getstate(), "numpy": np.random.default_rng(0).bit_generator.state},
    "enum": Choice.ONE,
    "path": pathlib.PurePosixPath("x"),
    "containers": [{1, 2}, frozenset([1]), collections.deque([1]), collections.defaultdict(list, {1: [2]})],
    "bytes": {b"key": bytearray(b"x"), "complex": 1j, "range": range(3), "slice": slice(1)},
    "class": argparse.ArgumentParser,
    "function": os.path.join,
    "dtype": [torch.float16, torch.Size([2]), torch.device("cpu"), torch.strided],
    "parameter": parameter_with_attributes(),
    "other tensors": torch.sparse_coo_tensor([[0]], [1.0], check_invariants=True),
}


@pytest.mark.parametrize("kind", ["zip", "zip, protocol 4", "legacy"])
@pytest.mark.parametrize("beside", BESIDE)
def test_objects_beside_the_weights_are_neither_built_nor_in_the_way(beside, kind, tmp_path, monkeypatch):
    model = weights()
    model["extra.half"] = torch.randn(3, 4).half()
    model["extra.transposed"] = torch.randn(3, 4).t()
    model["extra.view"] = torch.randn(10)[2:5]
    model["extra.parameter"] = torch.nn.Parameter(torch.ones(2))
    model["extra.attributes"] = parameter_with_attributes()
    content = {"args": BESIDE[beside], "model": model, "again": {"deep": [BESIDE[beside]]}, "epoch": 3}
    options = {"pickle_protocol": 4} if "4" in kind else {}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy", **options)
    monkeypatch.setattr(Exploding, "armed", True)
    read = read_tensors(path)
    assert {name: tensor.stride() for name, tensor in read.items()} == {n: t.stride() for n, t in model.items()}
    assert_same_bits(*({n: t.detach().contiguous() for n, t in tensors.items()} for tensors in (read, model)))
    assert all(type(tensor) is torch.Tensor for tensor in read.values())


def test_those_objects_would_be_built_by_a_trusting_reader(tmp_path, monkeypatch):
    """The test above proves something only if its classes notice."""
    torch.save(BESIDE["CfgNode"], tmp_path / "checkpoint.pth")
    monkeypatch.setattr(Exploding, "armed", True)
    with pytest.raises(AssertionError):
        torch.load(tmp_path / "checkpoint.pth", weights_only=False)


def test_classes_are_not_even_imported(tmp_path, monkeypatch):
    module = types.ModuleType("someones_code")
    module.Config = type("Config", (), {"__module__": "someones_code"})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "someones_code", module)
        torch.save({"model": weights(), "args": module.Config()}, tmp_path / "checkpoint.pth")
    (tmp_path / "someones_code.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_same_bits(read_tensors(tmp_path / "checkpoint.pth"), weights())
    assert "someones_code" not in sys.modules


def test_two_byte_types_of_newer_files(tmp_path):
    """Their tensors have a storage of bytes and say the type beside it."""
    for dtype in (torch.uint16, torch.float8_e4m3fn):
        tensor = torch.arange(6).to(dtype)[2:]
        torch.save({"model": {"a": tensor}, "args": argparse.Namespace()}, tmp_path / "checkpoint.pth")
        read = read_tensors(tmp_path / "checkpoint.pth")["a"]
        assert read.dtype is dtype
        assert read.float().tolist() == tensor.float().tolist()


# Which weights are taken: the plain ones are all 1, their average all 2.


def filled(value, prefix=""):
    return {prefix + name: torch.full_like(tensor, value) for name, tensor in weights().items()}


PLAIN, AVERAGE = 1.0, 2.0
TRAINED = {
    "timm": {"state_dict": filled(1), "state_dict_ema": filled(2), "args": argparse.Namespace(), "epoch": 3},
    "detectors": {"model": filled(1), "ema_model": filled(2, "module.")},
    "ModelEmaV2": {"model": filled(1), "model_ema": filled(2, "module.")},
    "D-FINE": {"model": filled(1), "ema": {"module": filled(2), "updates": 5}},
    "ema_state_dict": {"state_dict": filled(1), "ema_state_dict": filled(2)},
    # mmengine's EMAHook saves the average in the place of the plain weights.
    "mmengine": {
        "state_dict": filled(2),
        "ema_state_dict": {"steps": torch.tensor(5), **filled(1, "module.")},
        "message_hub": argparse.Namespace(),
        "meta": {"mmengine_version": "0.10"},
    },
}


def taken(path, **options):
    return load_checkpoint(path, **SETTLED, **options).classifier.weight.flatten()[0].item()


@pytest.mark.parametrize("source", TRAINED)
def test_averaged_weights_are_taken_unless_the_plain_ones_are_asked_for(source, tmp_path, caplog, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    torch.save(TRAINED[source], path)
    for use_ema, expected, said in ((None, AVERAGE, "EMA"), (True, AVERAGE, "EMA"), (False, PLAIN, "plain weights")):
        caplog.clear()
        assert taken(path, use_ema=use_ema) == expected
        assert said in caplog.text
        report = convert_checkpoint(path, tmp_path / "converted", **SETTLED, use_ema=use_ema)
        assert any(said in note for note in report.notes)
        assert taken(report.path) == expected
        model = FocalNetForImageClassification.from_pretrained(path, **SETTLED, use_ema=use_ema)
        assert model.classifier.weight.flatten()[0] == expected
    told = ["--set", "normalize_modulator=false", "--set", "use_post_layernorm=false"]
    with offline_and_undone(monkeypatch):
        result = run("convert", path, tmp_path / "by_command", *told, "--no-ema")
    assert "plain weights" in result.stdout
    assert taken(tmp_path / "by_command") == PLAIN


@pytest.mark.parametrize(
    ("content", "use_ema", "expected"),
    [
        ({"state_dict_ema": filled(2)}, None, AVERAGE),
        ({"state_dict": filled(1), "state_dict_ema": None}, None, PLAIN),
        ({"model": filled(1), "ema": 0.999}, None, PLAIN),
        ({"model": filled(1), "ema": {"decay": 0.999}}, None, PLAIN),
        ({"model": filled(1), "ema": argparse.Namespace(module=1)}, None, PLAIN),
        (filled(1), False, PLAIN),
        ({"model": filled(1)}, True, "expected averaged weights under 'state_dict_ema'"),
        (filled(1), True, "has one state dict"),
        ({"state_dict_ema": filled(2)}, False, "only averaged ones, under 'state_dict_ema'"),
    ],
    ids=["alone", "none", "decay", "decays", "object", "plain", "absent", "bare", "only averaged"],
)
def test_files_with_one_set_of_weights(content, use_ema, expected, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    if isinstance(expected, float):
        assert taken(path, use_ema=use_ema) == expected
    else:
        message = message_of(ValueError, load_checkpoint, path, **SETTLED, use_ema=use_ema)
        assert expected in message
        assert "leave use_ema out" in message

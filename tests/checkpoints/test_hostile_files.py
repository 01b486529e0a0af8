"""Pickles that run code where they are trusted: nothing of them runs here, in any format, and nothing is left changed.

Each payload leaves a folder, the trace, where it runs; that it does is part of the test.
"""

import contextlib
import functools
import io
import os
import pathlib
import pickle
import shutil
import subprocess
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from model_files import SMALL, assert_same_bits, message_of, named

from focalnet import FocalNetConfig, FocalNetForImageClassification, load_checkpoint
from focalnet.checkpoints import inert_pickle
from focalnet.checkpoints.files import read_tensors


class Call:
    """Pickled as a call of ``function``; what it gives may be the function of another call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """pickle wants a callable where it writes what is to be called."""


class RunsInItsState:
    def __setstate__(self, trace):
        os.mkdir(trace)


def pickled(payload):
    return io.BytesIO(pickle.dumps(payload)).getvalue()


def saved(payload):
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def hub_folder(trace):
    folder = pathlib.Path(trace).parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"import os\ndef go():\n    os.mkdir({trace!r})\n")
    return str(folder)


def object_array(trace):
    file = io.BytesIO()
    np.save(file, np.array([Call(os.mkdir, trace)], dtype=object), allow_pickle=True)
    return file.getvalue()


PAYLOADS = {
    "os.system": lambda trace: Call(os.system, f"mkdir '{trace}'"),
    "os.mkdir": lambda trace: Call(os.mkdir, trace),
    "subprocess": lambda trace: Call(subprocess.call, ["mkdir", trace]),
    "shutil": lambda trace: Call(shutil.copytree, hub_folder(trace), trace),
    "eval": lambda trace: Call(eval, f"__import__('os').mkdir({trace!r})"),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({trace!r})"),
    "getattr of an import": lambda trace: Call(Call(getattr, Call(__import__, "os"), "mkdir"), trace),
    "method of a path": lambda trace: Call(pathlib.Path.mkdir, pathlib.PosixPath(trace)),
    "state": lambda trace: Call(RunsInItsState, state=trace),
    "partial": lambda trace: Call(functools.partial(pathlib.Path.mkdir, pathlib.PosixPath(trace))),
    "pickle in a pickle": lambda trace: Call(pickle.loads, pickled(Call(os.mkdir, trace))),
    "torch.load": lambda trace: Call(
        torch.load, Call(io.BytesIO, saved(Call(os.mkdir, trace))), None, Call(__import__, "pickle")
    ),
    "torch.hub": lambda trace: Call(functools.partial(torch.hub.load, hub_folder(trace), "go", source="local")),
    "numpy.load": lambda trace: Call(np.load, Call(io.BytesIO, object_array(trace)), None, True),
    "torch's rebuilding": lambda trace: Call(
        torch._tensor._rebuild_from_type_v2, pathlib.Path.mkdir, torch.Tensor, (pathlib.PosixPath(trace),), {}
    ),
    "in a key": lambda trace: {Call(tuple, (Call(os.mkdir, trace),)): 1},
}
WHERE = {
    "beside": lambda payload, tensors: {"x": payload, "model": tensors},
    "after": lambda payload, tensors: {"model": tensors, "deep": [{"er": (payload,)}]},
    "among": lambda payload, tensors: {"model": {**tensors, "x": payload}},
    "instead": lambda payload, tensors: payload,
}
WRITE = {
    "zip": lambda content, path: torch.save(content, path),
    "zip, protocol 5": lambda content, path: torch.save(content, path, pickle_protocol=5),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.fixture(scope="module")
def tensors():
    return named(FocalNetForImageClassification(FocalNetConfig(**SMALL)), "authors")


def read_or_refused(path, tensors):
    """The weights as they are, or a ValueError that names the file: both are right for a hostile one."""
    try:
        assert_same_bits(read_tensors(path), tensors)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs(payload, tensors, tmp_path):
    for index, make_content in enumerate(WHERE.values()):
        for number, write in enumerate(WRITE.values()):
            trace = tmp_path / f"trace{index}{number}"
            path = tmp_path / "hostile.pth"
            write(make_content(PAYLOADS[payload](str(trace)), tensors), path)
            read_or_refused(path, tensors)
            assert not trace.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_would_run(payload, tmp_path):
    """Or the test above would prove nothing."""
    content = pickle.dumps(PAYLOADS[payload](str(tmp_path / "trace")))
    with contextlib.suppress(Exception):  # having run, some fail on what they got
        pickle.loads(content)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["posix.system", "os.popen", "builtins.eval", "__builtin__.exec", "subprocess.Popen"])
def test_what_only_an_attack_names_is_refused_by_name(name, tmp_path):
    module, function = name.rsplit(".", 1)
    write_pickle(tmp_path / "hostile.pth", f"c{module}\n{function}\n(tR.".encode())
    message = message_of(ValueError, load_checkpoint, tmp_path / "hostile.pth")
    assert "refused" in message
    assert name in message
    assert "nothing of it was run" in message


# Pickles that no Python object gives, written by hand.


def write_pickle(path, content, records=()):
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **dict(records)}.items():
            archive.writestr(f"archive/{name}", value)


def state_of(name, state):
    module, function = name
    return f"c{module}\n{function}\n".encode() + state + b"b."


@pytest.mark.parametrize(
    "name",
    [*inert_pickle._FUNCTIONS, ("collections", "OrderedDict"), ("argparse", "Namespace"), ("torch", "float32")],
    ids=".".join,
)
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aNs", b"N}X\x0c\x00\x00\x00__defaults__Ns\x86"])
def test_functions_and_classes_are_not_changed(name, state, tmp_path):
    """BUILD sets attributes of whatever is on the stack, classes and functions included."""
    target = inert_pickle._FUNCTIONS.get(name)
    before = (dict(vars(target)), target.__defaults__) if target else None
    write_pickle(tmp_path / "hostile.pth", state_of(name, state))
    assert "hostile.pth" in message_of(ValueError, read_tensors, tmp_path / "hostile.pth")
    assert before == ((dict(vars(target)), target.__defaults__) if target else None)
    assert not hasattr(inert_pickle.Inert, "a")
    assert not hasattr(inert_pickle._Dict, "a")


def test_names_with_dots_do_not_reach_into_modules():
    """Protocol 4 has pickle look up "serialization.os.system" in torch."""
    for module, name in (("torch", "serialization.os.mkdir"), ("torch._utils", "_rebuild_tensor.__globals__")):
        content = (
            pickle.PROTO
            + b"\x04"
            + b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
        )
        found = inert_pickle.load(io.BytesIO(content + pickle.STACK_GLOBAL + b"."))
        assert issubclass(found, inert_pickle.Inert)


TENSOR = (
    b"\x80\x02}X\x01\x00\x00\x00xcargparse\nNamespace\n)\x81sX\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
    b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
REST = b"\x89ccollections\nOrderedDict\n)RtRs."


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (b"K\x00K\x04\x85K\x01\x85", None),
        (b"K\x00J\x00\x00\x00\x7f\x85K\x01\x85", "larger than its data"),
        (b"K\x01K\x04\x85K\x01\x85", "larger than its data"),
        (b"K\x00K\x02\x85J\x00\x00\x00\x7f\x85", "larger than its data"),
        (b"J\xff\xff\xff\xffK\x04\x85K\x01\x85", "impossible shape"),
        (b"K\x00J\xff\xff\xff\xff\x85K\x01\x85", "impossible shape"),
    ],
    ids=["whole", "size", "offset", "stride", "negative offset", "negative size"],
)
def test_tensors_stay_inside_their_data(shape, said, tmp_path):
    path = tmp_path / "model.pth"
    write_pickle(path, TENSOR + shape + REST, [("data/0", np.arange(4, dtype=np.float32).tobytes())])
    if said is None:
        message = message_of(ValueError, read_tensors, path)
        assert "'x' (of argparse.Namespace)" in message
    else:
        assert said in message_of(ValueError, read_tensors, path)


def test_source_code_in_old_files_is_not_looked_at(tmp_path, monkeypatch):
    """torch compares it with a class's own, and may write the difference into the working directory."""
    unpickler = inert_pickle.Unpickler(io.BytesIO(b"(X\x06\x00\x00\x00modulecargparse\nNamespace\nVfile\nVcode\ntQ."))
    unpickler.persistent_load = lambda saved: pytest.fail("reached torch")
    with pytest.raises(pickle.UnpicklingError, match="something else than the data"):
        unpickler.load()


def test_names_in_the_archive_are_no_paths(tensors, tmp_path):
    torch.save({"model": tensors, "args": types.SimpleNamespace()}, tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth", "a") as archive:
        archive.writestr("model/../../escaped", b"x")
        archive.writestr("/escaped", b"x")
    before = sorted(tmp_path.parent.rglob("*"))
    read_or_refused(tmp_path / "model.pth", tensors)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_torchscript_and_tar_files_are_refused(tmp_path):
    """torch hands them to readers of their own, which run what is in them."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            content = pickle.dumps(Call(os.mkdir, str(tmp_path / "trace")))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for name in ("script.pth", "old.pth"):
        assert "of another kind" in message_of(ValueError, load_checkpoint, tmp_path / name)
    assert not (tmp_path / "trace").exists()

"""A pickle module for torch.load that builds tensors and plain containers, and nothing else.

torch's own weights-only reader refuses a file as soon as it names a class that it does not know, and dict subclasses
altogether. Training scripts leave such objects beside the weights: an argparse.Namespace, a yacs CfgNode, numpy
scalars. Here every name that is not one of the few below becomes an `Inert`: it takes whatever the pickle does to it
and does nothing. Nothing is looked up or imported by a name that the file gives.

What may be called is a closed list: `_rebuild` and its kin, which make a tensor of a storage and check that it lies
inside, and plain values of torch. They are wrapped anew for each file and take no state, so that a file cannot change
anything that outlives it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor
from torch.storage import TypedStorage

# Modules that no training script leaves in a checkpoint, and that a file would name to run something.
_HOSTILE_MODULES = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "ctypes", "importlib", "runpy", "webbrowser"}
)
_HOSTILE_BUILTINS = frozenset({"eval", "exec", "compile", "open", "__import__", "breakpoint", "input"})


class Hostile(pickle.UnpicklingError):
    """The pickle names a function that only a file made to run code would name; ``name`` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}")
        self.name = name


class Inert:
    """What stands for an object of an unknown class, or for what a call of an unknown function would have given."""

    __slots__ = ()
    names = "an object"

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> Inert:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """As a list's, since the class may be a list's."""

    def extend(self, items: object) -> None:
        """As a list's."""

    def add(self, item: object) -> None:
        """As a set's."""


class _Dict(dict[str, Any]):
    """An OrderedDict of the file, without the attributes that a pickle could set on one."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Function:
    """One of the functions that a pickle may call; it keeps no attributes and takes no state."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


def _rebuild(storage: object, offset: object, size: object, stride: object, *rest: object) -> object:
    """A tensor on a storage of the file; whether it wants gradients, and its hooks, are left out."""
    metadata = rest[2:]  # such as that values are negated, which weights never are
    if type(storage) is not TypedStorage or any(metadata):
        return Inert()
    _check_inside(storage, offset, size, stride)
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _rebuild_of_dtype(storage: object, *rest: object) -> object:
    """As `_rebuild`, for dtypes that have no storage class; their storage counts bytes."""
    offset, size, stride, wants_gradient, hooks, dtype, *metadata = rest
    if type(storage) is not TypedStorage or not isinstance(dtype, torch.dtype):
        return Inert()
    typed = TypedStorage(wrap_storage=storage._untyped_storage, dtype=dtype, _internal=True)
    return _rebuild(typed, offset, size, stride, wants_gradient, hooks, *metadata)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data if type(data) is Tensor else Inert()


def _rebuild_from_type(function: object, kind: object, args: Any, state: object) -> object:
    """A tensor with attributes, or of a subclass: the tensor alone, where it is one that can be had."""
    return function(*args) if isinstance(function, _Function) else Inert()


def _check_inside(storage: TypedStorage, offset: Any, size: Any, stride: Any) -> None:
    """Otherwise torch would enlarge the storage to whatever the file says."""
    numbers = [offset, *size, *stride]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("it has a tensor of impossible shape")
    if 0 in size:
        return
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= storage._size():
        raise pickle.UnpicklingError("it has a tensor that is larger than its data")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda *sizes: tuple(*sizes),
}
_DTYPES = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_BYTES = ("torch.storage", "UntypedStorage")


class Unpickler(pickle.Unpickler):
    """Reads a pickle without running or building anything of it; torch.load derives its own from this one."""

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        self._found: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str) -> object:
        """What stands for a name in the file.

        Raises:
            Hostile: only a file that is made to run code would have this name.
        """
        key = (module, name)
        if key not in self._found:
            self._found[key] = _stand_in(module, name)
        return self._found[key]

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.load sets it; in old files it also takes source code, to be compared with what the class has here.
        super().__setattr__(name, _storages_only(value) if name == "persistent_load" else value)


def load(file: IO[bytes], **options: Any) -> object:
    """One pickle from ``file``, as pickle.load."""
    return Unpickler(file, **options).load()


def _stand_in(module: str, name: str) -> object:
    key = (module, name)
    if module.split(".")[0] in _HOSTILE_MODULES or (
        module in ("builtins", "__builtin__") and name.split(".")[0] in _HOSTILE_BUILTINS
    ):
        raise Hostile(f"{module}.{name}")
    if key in _FUNCTIONS:
        return _Function(_FUNCTIONS[key])
    if key in _DTYPES:
        return _DTYPES[key]
    if key == ("collections", "OrderedDict"):
        return type("_Dict", (_Dict,), {"__slots__": ()})
    return type("Inert", (Inert,), {"__slots__": (), "names": f"{module}.{name}"})


def _storages_only(persistent_load: Callable[[tuple[Any, ...]], object]) -> Callable[[object], object]:
    def load_storage(saved: object) -> object:
        if type(saved) is not tuple or len(saved) < 2 or saved[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("it refers to something else than the data of a tensor")
        kind = saved[1]
        if isinstance(kind, type) and issubclass(kind, Inert) and kind.names == ".".join(_BYTES):
            kind = torch.UntypedStorage
        return persistent_load((saved[0], kind, *saved[2:]))

    return load_storage

"""A pickle module for torch.load that constructs tensors and plain containers, and nothing else.

torch's weights-only reader refuses a file that names an unknown class or a subclass of dict. Training scripts store
such objects beside the weights: an argparse.Namespace, a yacs CfgNode, numpy scalars. Here every unknown name becomes
an `Inert`, an object that accepts all operations of a pickle and does nothing. No name from a file is ever imported.

A pickle may call only a closed list of functions: `_rebuild` and its variants, which make a tensor from a storage and
check that it lies inside the storage, and plain values of torch. They are wrapped anew for each file and take no
state, so a file cannot change anything that lasts longer than its own loading.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor
from torch.storage import TypedStorage

# Modules that no training script refers to in a checkpoint. A file names them only to run code.
_HOSTILE_MODULES = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "ctypes", "importlib", "runpy", "webbrowser"}
)
_HOSTILE_BUILTINS = frozenset({"eval", "exec", "compile", "open", "__import__", "breakpoint", "input"})


class Hostile(pickle.UnpicklingError):
    """The pickle names a function that only a file made to run code would name; ``name`` is that function."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}")
        self.name = name


class Inert:
    """Replaces an object of an unknown class, or the result of a call of an unknown function."""

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
        """Ignore the item. A pickle calls this for subclasses of list."""

    def extend(self, items: object) -> None:
        """Ignore the items. A pickle calls this for subclasses of list."""

    def add(self, item: object) -> None:
        """Ignore the item. A pickle calls this for subclasses of set."""


class _Dict(dict[str, Any]):
    """Replaces an OrderedDict in the file; a pickle cannot set attributes on it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Function:
    """A function that a pickle may call. It accepts no attributes and no state."""

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
    """A tensor on a storage of the file. ``requires_grad`` and hooks are ignored."""
    metadata = rest[2:]  # for example the negation bit, which weights never have
    if type(storage) is not TypedStorage or any(metadata):
        return Inert()
    _check_inside(storage, offset, size, stride)
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _rebuild_of_dtype(storage: object, *rest: object) -> object:
    """Like `_rebuild`, for dtypes without a storage class; the storage then counts bytes."""
    offset, size, stride, wants_gradient, hooks, dtype, *metadata = rest
    if type(storage) is not TypedStorage or not isinstance(dtype, torch.dtype):
        return Inert()
    typed = TypedStorage(wrap_storage=storage._untyped_storage, dtype=dtype, _internal=True)
    return _rebuild(typed, offset, size, stride, wants_gradient, hooks, *metadata)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data if type(data) is Tensor else Inert()


def _rebuild_from_type(function: object, kind: object, args: Any, state: object) -> object:
    """A tensor with attributes or of a subclass. Only the plain tensor is made, if ``function`` is an allowed one."""
    return function(*args) if isinstance(function, _Function) else Inert()


def _check_inside(storage: TypedStorage, offset: Any, size: Any, stride: Any) -> None:
    """Raise if a tensor does not fit into its storage: torch would enlarge the storage to any size the file gives."""
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
    """Reads a pickle without running code or constructing its objects. torch.load derives its own class from this."""

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        self._found: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str) -> object:
        """The replacement for a name in the file.

        Raises:
            Hostile: only a file made to run code contains this name.
        """
        key = (module, name)
        if key not in self._found:
            self._found[key] = _stand_in(module, name)
        return self._found[key]

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.load assigns persistent_load. For old files that function also compares source code of classes, which
        # `_storages_only` prevents.
        super().__setattr__(name, _storages_only(value) if name == "persistent_load" else value)


def load(file: IO[bytes], **options: Any) -> object:
    """Read one pickle from ``file``, like pickle.load."""
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

"""timm without torchvision, which it imports for its data pipelines.

torchvision has no CPU build to install beside torch's from the package index.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stubbed_torchvision() -> Iterator[None]:
    """Lets timm be imported where torchvision is not installed: an empty one stands in for it until the end.

    >>> with stubbed_torchvision():
    ...     import timm
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        # Others (transformers among them) go by whether torchvision can be found.
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


class _Finder:
    """Finds every module of torchvision, each with whatever is asked of it."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Named(type):
    """A class whose attributes are their own names, as an enumeration's would do."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {"__init__": lambda self, *a, **k: None})

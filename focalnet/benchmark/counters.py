"""Counts operators, the bytes of their arguments and results, and the bytes saved for backward.

>>> with OperatorCounter() as counter, torch.no_grad():
...     model(images)
>>> counter.operators, counter.bytes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .runtimes import Case, ours, theirs, timm_model


class OperatorCounter(TorchDispatchMode):
    """A context that counts the operators of ATen and of this package, except views, which move no data.

    ``bytes`` is the total size of all tensor arguments and results of all calls, including weights. An operator's
    internal scratch memory is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.by_operator: Counter[str] = Counter()

    @property
    def operators(self) -> int:
        """Number of operators that ran."""
        return self.by_operator.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        if not _is_view(func, result):
            self.by_operator[str(func)] += 1
            self.bytes += _tensor_bytes((args, kwargs, result))
        return result


def _is_view(func: torch._ops.OpOverload, result: object) -> bool:
    returns = func._schema.returns
    aliases = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(aliases) or not any(isinstance(leaf, Tensor) for leaf in tree_iter(result))


def _tensor_bytes(tree: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def saved_bytes(model: torch.nn.Module, images: Tensor) -> int:
    """Bytes of the storages that a forward pass saves for backward, each counted once, without parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())


def counted(name: str, case: Case) -> dict[str, float]:
    """Operators called in an inference pass of a model of `COUNTED`, and bytes moved and bytes saved per image.

    The pass runs under no_grad. In inference mode composite operators would be counted in addition to their parts.
    """
    make, device = COUNTED[name]
    with torch.device(device):
        model = make(Case(case.variant, case.size, case.batch, device=device))
        images = torch.zeros(case.batch, 3, case.size, case.size)
    with torch.no_grad(), OperatorCounter() as counter:
        model(images)
    return {
        "operators": counter.operators,
        "bytes_per_image": counter.bytes / case.batch,
        "saved_bytes_per_image": saved_bytes(model.train(), images) / case.batch,
    }


# The function that makes each model, and its device. On meta tensors nothing is computed, and plain PyTorch dispatches
# the same operators as on any device. Our models call CPU-only operators on the CPU, and on meta tensors the operators
# that they would call on a GPU.
COUNTED: dict[str, tuple[Callable[[Case], torch.nn.Module], str]] = {
    "focalnet": (ours, "cpu"),
    "focalnet, without CPU kernels": (ours, "meta"),
    "transformers": (theirs, "meta"),
    "timm": (timm_model, "meta"),
}

"""What a call moves between operators: how many of them run, and the bytes that they are given and give back.

>>> with OperatorCounter() as counter, torch.inference_mode():
...     model(images)
>>> counter.operators, counter.bytes
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class OperatorCounter(TorchDispatchMode):
    """Counts ATen's and the package's operators while it is entered; views move nothing and are left out.

    bytes: of all tensors among the arguments and the results, each counted whenever an operator takes or gives it,
    weights included. What an operator keeps to itself (its scratch) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.by_operator: Counter[str] = Counter()

    @property
    def operators(self) -> int:
        """How many operators ran."""
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

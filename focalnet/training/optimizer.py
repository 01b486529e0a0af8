"""Groups a model's parameters by weight decay and learning rate."""

from __future__ import annotations

import re

from torch import nn

_BLOCK = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
_DOWNSAMPLING = re.compile(r"encoder\.stages\.(\d+)\.downsample\.")


def parameter_groups(
    model: nn.Module, depths: list[int], learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Groups for an optimizer, from the stem to the head.

    Parameters with fewer than two dimensions larger than 1 have no weight decay: norms, biases, layer scales and the
    mask token. With ``layer_decay`` below 1, the learning rate n blocks below the head is multiplied by layer_decay^n
    (as in Clark et al., arXiv:2003.10555). A downsampling layer belongs to the block before it.
    """
    head = sum(depths) + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = sum(side > 1 for side in parameter.shape) > 1
            groups.setdefault((depth_of(name, depths), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (head - depth),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def depth_of(name: str, depths: list[int]) -> int:
    """The depth of a parameter's module: the stem is 0, the first block 1, and the head one above the last block."""
    if match := _BLOCK.search(name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    if match := _DOWNSAMPLING.search(name):
        return sum(depths[: int(match[1]) + 1])
    return 0 if "embeddings." in name else sum(depths) + 1

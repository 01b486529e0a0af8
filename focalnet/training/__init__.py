"""Training: pre-training on masked images and fine-tuning of classifiers, on transformers' Trainer.

The commands finetune and pretrain call ``focalnet.training.finetune`` and ``focalnet.training.pretrain``. Training
needs the extra ``train``: datasets, accelerate, kornia, matplotlib, scikit-learn, scikit-image.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipes import Recipe, load_recipe, recipe_names
    from .runs import Run, finetune, pretrain
    from .settings import Settings

__all__ = ["Recipe", "Run", "Settings", "finetune", "load_recipe", "pretrain", "recipe_names"]

_MODULE_OF = {
    "Recipe": "recipes",
    "Run": "runs",
    "Settings": "settings",
    "finetune": "runs",
    "load_recipe": "recipes",
    "pretrain": "runs",
    "recipe_names": "recipes",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)

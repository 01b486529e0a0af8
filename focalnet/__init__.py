"""focalnet: a fast FocalNet for PyTorch, drop-in for the one in transformers.

This file defines the public names. The operators and the layer need only torch. Names that need transformers are
imported on first access, because importing transformers takes longer than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__
from .backends.registry import backends, use_backend
from .functional import focal_modulation, gated_aggregation
from .modules import FocalModulation
from .operators import flops as _flops  # noqa: F401  (registers formulas)

if TYPE_CHECKING:
    from .configuration import FocalNetConfig
    from .inspection import BlockMaps, Inspection, inspect
    from .models.auto import register_auto_classes
    from .models.loading import Conversion, convert_checkpoint, load_checkpoint
    from .models.modeling import (
        FocalNetBackbone,
        FocalNetForImageClassification,
        FocalNetForMaskedImageModeling,
        FocalNetModel,
        FocalNetPreTrainedModel,
    )
    from .patching import PatchReport, patch, unpatch

__all__ = [
    "BlockMaps",
    "Conversion",
    "FocalModulation",
    "FocalNetBackbone",
    "FocalNetConfig",
    "FocalNetForImageClassification",
    "FocalNetForMaskedImageModeling",
    "FocalNetModel",
    "FocalNetPreTrainedModel",
    "Inspection",
    "PatchReport",
    "__version__",
    "backends",
    "convert_checkpoint",
    "focal_modulation",
    "gated_aggregation",
    "inspect",
    "load_checkpoint",
    "patch",
    "register_auto_classes",
    "unpatch",
    "use_backend",
]

_MODULE_OF = {
    "register_auto_classes": "models.auto",
    "FocalNetConfig": "configuration",
    "BlockMaps": "inspection",
    "Inspection": "inspection",
    "inspect": "inspection",
    "Conversion": "models.loading",
    "convert_checkpoint": "models.loading",
    "load_checkpoint": "models.loading",
    "FocalNetBackbone": "models.modeling",
    "FocalNetForImageClassification": "models.modeling",
    "FocalNetForMaskedImageModeling": "models.modeling",
    "FocalNetModel": "models.modeling",
    "FocalNetPreTrainedModel": "models.modeling",
    "PatchReport": "patching",
    "patch": "patching",
    "unpatch": "patching",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

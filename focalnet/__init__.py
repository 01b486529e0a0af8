"""focalnet: FocalNet for PyTorch, drop-in for transformers'.

This file says what is public.
"""

from ._version import __version__
from .auto import register_auto_classes
from .backends import backends, use_backend
from .configuration import FocalNetConfig
from .functional import focal_modulation, gated_aggregation
from .modeling import (
    FocalNetBackbone,
    FocalNetForImageClassification,
    FocalNetForMaskedImageModeling,
    FocalNetModel,
    FocalNetPreTrainedModel,
)
from .modules import FocalModulation

__all__ = [
    "FocalModulation",
    "FocalNetBackbone",
    "FocalNetConfig",
    "FocalNetForImageClassification",
    "FocalNetForMaskedImageModeling",
    "FocalNetModel",
    "FocalNetPreTrainedModel",
    "__version__",
    "backends",
    "focal_modulation",
    "gated_aggregation",
    "register_auto_classes",
    "use_backend",
]

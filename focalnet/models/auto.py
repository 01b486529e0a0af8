"""Registration with transformers' Auto classes: one explicit call, never a side effect of import."""

from __future__ import annotations

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from ..configuration import FocalNetConfig
from .modeling import FocalNetBackbone, FocalNetForImageClassification, FocalNetForMaskedImageModeling, FocalNetModel


def register_auto_classes() -> None:
    """Makes transformers' Auto classes (AutoConfig, AutoModel..., AutoBackbone) build this package's FocalNet.

    This holds for the whole process. transformers' own FocalNet can still be imported by name. A second call does
    nothing.
    """
    AutoConfig.register("focalnet", FocalNetConfig, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, FocalNetModel),
        (AutoModelForImageClassification, FocalNetForImageClassification),
        (AutoModelForMaskedImageModeling, FocalNetForMaskedImageModeling),
        (AutoBackbone, FocalNetBackbone),
    ):
        auto_class.register(FocalNetConfig, model_class, exist_ok=True)

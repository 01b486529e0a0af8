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
    """From here on the Auto classes (AutoConfig, AutoModel..., AutoBackbone) give this package's "focalnet".

    transformers' own FocalNet is no longer what the Auto classes give in this process; it stays importable by name.
    Calling it twice is harmless.
    """
    AutoConfig.register("focalnet", FocalNetConfig, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, FocalNetModel),
        (AutoModelForImageClassification, FocalNetForImageClassification),
        (AutoModelForMaskedImageModeling, FocalNetForMaskedImageModeling),
        (AutoBackbone, FocalNetBackbone),
    ):
        auto_class.register(FocalNetConfig, model_class, exist_ok=True)

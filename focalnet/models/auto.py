"""Registration with transformers' Auto classes. It is an explicit call and never a side effect of an import."""

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
    """Make transformers' Auto classes (AutoConfig, AutoModel..., AutoBackbone) build this package's FocalNet.

    The registration applies to the whole process. transformers' own FocalNet can still be imported by name. A second
    call has no effect.
    """
    AutoConfig.register("focalnet", FocalNetConfig, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, FocalNetModel),
        (AutoModelForImageClassification, FocalNetForImageClassification),
        (AutoModelForMaskedImageModeling, FocalNetForMaskedImageModeling),
        (AutoBackbone, FocalNetBackbone),
    ):
        auto_class.register(FocalNetConfig, model_class, exist_ok=True)

"""Networks of FocalNet-T's size that people choose between: each as a runtime, as transformers ships it.

The paper's claim (section 4.1) is a better result at about the cost of Swin and ViT; this compares the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .runtimes import Case, stepping


def swin_tiny(case: Case) -> Callable:
    """28 M parameters, 4.5 GFLOP an image of 224."""
    import transformers

    config = transformers.SwinConfig(image_size=case.size, num_labels=1000)
    return _run(transformers.SwinForImageClassification, config, case)


def convnext_tiny(case: Case) -> Callable:
    """29 M parameters, 4.5 GFLOP."""
    import transformers

    return _run(transformers.ConvNextForImageClassification, transformers.ConvNextConfig(num_labels=1000), case)


def vit_small(case: Case) -> Callable:
    """22 M parameters, 4.6 GFLOP."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    config = transformers.ViTConfig(**sizes, image_size=case.size, num_labels=1000)
    return _run(transformers.ViTForImageClassification, config, case)


def _run(model_class: type, config: object, case: Case) -> Callable:
    torch.manual_seed(0)
    return stepping(case.placed(model_class(config).train(case.training)))


ARCHITECTURES: dict[str, Callable[[Case], Callable]] = {
    "Swin-T": swin_tiny,
    "ConvNeXt-T": convnext_tiny,
    "ViT-S": vit_small,
}

"""Other networks of about FocalNet-T's size, as implemented in transformers, for comparison.

The paper (section 4.1) claims better accuracy at about the cost of Swin and ViT. These models serve to compare the
cost.
"""

from __future__ import annotations

import torch

from .runtimes import Case, MakeModel, Start, eager


def swin_tiny(case: Case) -> torch.nn.Module:
    import transformers

    config = transformers.SwinConfig(image_size=case.size, num_labels=1000)
    return _built(transformers.SwinForImageClassification, config, case)


def convnext_tiny(case: Case) -> torch.nn.Module:
    import transformers

    return _built(transformers.ConvNextForImageClassification, transformers.ConvNextConfig(num_labels=1000), case)


def vit_small(case: Case) -> torch.nn.Module:
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    config = transformers.ViTConfig(**sizes, image_size=case.size, num_labels=1000)
    return _built(transformers.ViTForImageClassification, config, case)


def _built(model_class: type, config: object, case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    with case.building():
        model = model_class(config)
    return case.placed(model.train(case.training))


MODELS: dict[str, MakeModel] = {"Swin-T": swin_tiny, "ConvNeXt-T": convnext_tiny, "ViT-S": vit_small}
ARCHITECTURES: dict[str, Start] = {name: eager(make) for name, make in MODELS.items()}

"""Five small classifiers of 32 x 32 images with the parameters and FLOPs of a FocalNet, within 5 percent.

FocalNet, Swin and ConvNeXt have a stage at 8 x 8 and one at 4 x 4. ViT has 4 x 4 patches. What was free to choose
(depths, widths, hidden sizes of the MLPs) settles their cost; all else is transformers' default. None drops paths,
since transformers' ViT cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import focalnet

OURS = "focalnet"
IMAGE_SIZE = 32
_FOCALNET = {
    "patch_size": 4,
    "embed_dim": 24,
    "hidden_sizes": [48, 48],
    "depths": [1, 4],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
}


@dataclass(frozen=True)
class Network:
    """A network's classes, without ``masked`` if transformers has none, and the side of a masked patch in pixels."""

    classifier: type[transformers.PreTrainedModel]
    masked: type[transformers.PreTrainedModel] | None
    fields: dict[str, object]
    stride: int = 4

    def config(self, labels: int) -> transformers.PreTrainedConfig:
        fields = {"image_size": IMAGE_SIZE, "encoder_stride": 8, "drop_path_rate": 0.0, **self.fields}
        return self.classifier.config_class(num_labels=labels, **fields)

    def but(self, **fields: object) -> Network:
        """This network with some fields of its configuration replaced."""
        return replace(self, fields={**self.fields, **fields})

    def make_classifier(self, labels: int, seed: int) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        return self.classifier(self.config(labels))

    def make_masked(self, seed: int) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        return self.masked(self.config(labels=2))


NETWORKS = {
    OURS: Network(focalnet.FocalNetForImageClassification, focalnet.FocalNetForMaskedImageModeling, _FOCALNET),
    "transformers": Network(transformers.FocalNetForImageClassification, None, _FOCALNET),
    "Swin": Network(
        transformers.SwinForImageClassification,
        transformers.SwinForMaskedImageModeling,
        {"embed_dim": 24, "depths": [1, 4], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 4.25},
    ),
    "ViT": Network(
        transformers.ViTForImageClassification,
        transformers.ViTForMaskedImageModeling,
        {
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 234,
            "depths": [4],  # not the model's: the Trainer's groups of parameters ask for it
        },
        stride=8,
    ),
    "ConvNeXt": Network(
        transformers.ConvNextForImageClassification,
        None,
        {"num_stages": 2, "hidden_sizes": [24, 48], "depths": [1, 6]},
    ),
}


def size_of(name: str, labels: int = 10) -> dict[str, int]:
    """The parameters of a network, and the FLOPs of an image, where a multiply-add is two."""
    with torch.device("meta"):
        model = NETWORKS[name].make_classifier(labels, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops()}

"""What each published code base calls the parts of its focal modulation: for operators, patching and checkpoints.

"authors" are the classification, detection and segmentation code of microsoft/FocalNet, and what was made from it:
X-Decoder and SEEM (scaling_modulator), FocalNet-DINO, detrex, MaskDINO.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModulationNames:
    """The name of each part. ``normalize`` are flags that mean the same; ``focal_layers`` has one name everywhere."""

    projection_in: str
    projection_context: str
    projection_out: str
    projection_dropout: str
    activation: str
    layernorm: str
    normalize: tuple[str, ...] = ("normalize_modulator",)
    channels_first: bool = False

    @property
    def required(self) -> set[str]:
        return {self.projection_in, self.projection_context, self.projection_out, "focal_layers"}

    @property
    def known(self) -> set[str]:
        return self.required | {self.projection_dropout, self.activation, self.layernorm}


MODULATION = {
    "transformers": ModulationNames(
        "projection_in", "projection_context", "projection_out", "projection_dropout", "activation", "layernorm"
    ),
    "authors": ModulationNames(
        "f", "h", "proj", "proj_drop", "act", "ln", normalize=("normalize_modulator", "scaling_modulator")
    ),
    "timm": ModulationNames("f", "h", "proj", "proj_drop", "act", "norm", channels_first=True),
}

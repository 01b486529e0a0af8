"""What each published code base calls the parts of a block: for operators, patching and checkpoints.

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


@dataclass(frozen=True)
class BlockNames:
    """The name of each part of a block. ``norm1``, ``norm2``, ``mlp`` and ``modulation`` have one name everywhere.

    Attributes:
        modulation: the names of the parts of the modulation.
        post_norm: name of the flag that puts the norms after the branches. Without such a flag, the names of the two
            norms after the branches, which are identities if unused.
        layernorm_flag: name of the modulation's flag that turns its LayerNorm on; None if an identity turns it off.
        scales: names of the two layer scales.
        scale_modules: the layer scales are modules with a parameter ``gamma``; otherwise they are parameters.
        dropouts: dropouts of the modulation and the MLP.
        drop_paths: stochastic depth, in the block.
        patch_projection: the convolution of patch embeddings.
    """

    modulation: ModulationNames
    post_norm: str | tuple[str, str] = "use_post_layernorm"
    layernorm_flag: str | None = "use_post_layernorm_in_modulation"
    scales: tuple[str, str] = ("gamma_1", "gamma_2")
    scale_modules: bool = False
    dropouts: tuple[str, ...] = ("projection_dropout", "drop")
    drop_paths: tuple[str, ...] = ("drop_path",)
    patch_projection: str = "projection"

    @property
    def random(self) -> tuple[str, ...]:
        """Parts that do nothing in inference."""
        return (*self.dropouts, *self.drop_paths)

    @property
    def post_norms(self) -> tuple[str, ...]:
        """The names of separate norms after the branches, if there are any."""
        return self.post_norm if isinstance(self.post_norm, tuple) else ()

    @property
    def children(self) -> set[str]:
        """The modules that a block consists of."""
        scales = self.scales if self.scale_modules else ()
        return IN_EVERY_BLOCK | {*self.post_norms, *scales, *self.drop_paths}

    @property
    def scale_parameters(self) -> tuple[str, ...]:
        return tuple(f"{name}.gamma" if self.scale_modules else name for name in self.scales)


IN_EVERY_BLOCK = {"norm1", "modulation", "norm2", "mlp"}
BLOCK = {
    "transformers": BlockNames(MODULATION["transformers"]),
    "authors": BlockNames(
        MODULATION["authors"],
        post_norm="use_postln",
        layernorm_flag=None,
        dropouts=("proj_drop", "drop"),
        patch_projection="proj",
    ),
    "timm": BlockNames(
        MODULATION["timm"],
        post_norm=("norm1_post", "norm2_post"),
        layernorm_flag=None,
        scales=("ls1", "ls2"),
        scale_modules=True,
        dropouts=("proj_drop", "drop1", "drop2"),
        drop_paths=("drop_path1", "drop_path2"),
        patch_projection="proj",
    ),
}

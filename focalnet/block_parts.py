"""What a block is made of, whatever its code base calls the parts.

`fused_block` computes every block of this make: a focal modulation and an MLP, each a residual branch, with LayerNorm
before or behind the branch and a scale behind that.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .plain import is_changed, is_exact_gelu, is_hooked


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block. A linear layer may be a 1x1 convolution; scales and ``layernorm`` may be missing."""

    post_norm: bool
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    projection_in: nn.Module
    focal_convs: tuple[nn.Conv2d, ...]
    projection_context: nn.Conv2d
    normalize_modulator: bool
    layernorm: nn.LayerNorm | None
    projection_out: nn.Module
    gamma_1: Tensor | None
    fc1: nn.Module
    fc2: nn.Module
    gamma_2: Tensor | None


@dataclass(frozen=True)
class BlockNames:
    """What a code base calls the parts of its block.

    ``post_norm`` is the flag that says where the norms act; without one, it is the names of the norms that act behind
    the branch, which are identities otherwise. ``modulation`` and ``mlp`` are the classes of those parts; without one,
    their structure decides. ``forward`` is the function that the modulation's forward may be bound to, if it is not
    that of its class.
    """

    modulation: type | None = None
    mlp: type | None = None

    post_norm: str | tuple[str, str] = "use_post_layernorm"
    projection_in: str = "projection_in"
    projection_context: str = "projection_context"
    projection_out: str = "projection_out"
    layernorm: str = "layernorm"
    use_layernorm: str | None = "use_post_layernorm_in_modulation"
    normalize: tuple[str, ...] = ("normalize_modulator",)
    activation: str = "activation"
    scales: tuple[str, str] = ("gamma_1", "gamma_2")
    random: str = r"modulation\.projection_dropout|mlp\.drop|drop_path"
    forward: Callable | None = None

    def parts_of(self, block: nn.Module) -> BlockParts:
        modulation, mlp = block.modulation, block.mlp
        scales = [getattr(block, name) for name in self.scales]
        norm1, norm2, post_norm = block.norm1, block.norm2, False
        if isinstance(self.post_norm, str):
            post_norm = getattr(block, self.post_norm, False)
        elif isinstance(norm1, nn.Identity):
            norm1, norm2, post_norm = *(getattr(block, name) for name in self.post_norm), True
        has_layernorm = self.use_layernorm is None or getattr(modulation, self.use_layernorm, False)
        layernorm = getattr(modulation, self.layernorm, None) if has_layernorm else None
        return BlockParts(
            post_norm=bool(post_norm),
            norm1=norm1,
            norm2=norm2,
            projection_in=getattr(modulation, self.projection_in),
            focal_convs=tuple(level[0] for level in modulation.focal_layers),
            projection_context=getattr(modulation, self.projection_context),
            normalize_modulator=any(getattr(modulation, name, False) for name in self.normalize),
            layernorm=None if isinstance(layernorm, nn.Identity) else layernorm,
            projection_out=getattr(modulation, self.projection_out),
            gamma_1=_scale(scales[0]),
            fc1=mlp.fc1,
            fc2=mlp.fc2,
            gamma_2=_scale(scales[1]),
        )

    def unusual_part(self, block: nn.Module) -> str | None:
        """Why a part of ``block`` is not what the operator takes it for, or None if all are."""
        for name, module in list(block.named_modules())[1:]:
            usual = next((usual for pattern, usual in self._roles if re.fullmatch(pattern, name)), _never)
            if not usual(module) or is_hooked(module) or (is_changed(module) and not self._is_bound(name, module)):
                return f"{name} is {type(module).__name__}, or was wrapped or hooked; expected a plain part of a block"
        if any(scale != 1 for scale in self._plain_scales(block)):
            return f"{' and '.join(self.scales)} are numbers other than 1"
        return None

    def _plain_scales(self, block: nn.Module) -> list[float]:
        scales = (getattr(block, name, None) for name in self.scales)
        return [scale for scale in scales if isinstance(scale, (int, float))]

    def _is_bound(self, name: str, module: nn.Module) -> bool:
        bound = module.__dict__["forward"]
        return name == "modulation" and self.forward is not None and getattr(bound, "func", None) is self.forward

    @functools.cached_property
    def _roles(self) -> tuple[tuple[str, Callable[[nn.Module], bool]], ...]:
        """What each part has to be, by a pattern of its name."""
        inner = rf"modulation\.({self.projection_in}|{self.projection_context}|{self.projection_out})"
        return (
            (rf"norm[12](_post)?|modulation\.{self.layernorm}", _is_norm),
            (rf"{inner}|mlp\.fc[12]", _is_linear),
            (r"modulation\.focal_layers\.\d+\.0", lambda module: type(module) is nn.Conv2d),
            (rf"modulation\.(focal_layers\.\d+\.1|activation|act)|mlp\.{self.activation}", is_exact_gelu),
            (r"modulation\.focal_layers(\.\d+)?", lambda module: type(module) in (nn.ModuleList, nn.Sequential)),
            (self.random, lambda module: type(module) is nn.Identity or is_random(module)),
            (r"ls[12]", lambda module: type(module) is nn.Identity or type(module).__name__ == "LayerScale2d"),
            (r"mlp\.norm", lambda module: type(module) is nn.Identity),
            (r"modulation", lambda module: self.modulation in (None, type(module))),
            (r"mlp", lambda module: self.mlp in (None, type(module)) and _MLP_PARTS.issuperset(module._modules)),
        )


_MLP_PARTS = {"fc1", "activation", "act", "drop", "drop1", "norm", "fc2", "drop2"}


def _scale(scale: object) -> Tensor | None:
    """A parameter, a module with one, or a plain number, which is 1 wherever there is no layer scale."""
    scale = getattr(scale, "gamma", scale)
    return scale if isinstance(scale, Tensor) else None


def _never(_: nn.Module) -> bool:
    return False


def _is_norm(module: nn.Module) -> bool:
    # LayerNorm2d is timm's: the same norm of a channels-first map, which it is not here.
    return type(module) in (nn.LayerNorm, nn.Identity) or type(module).__name__ == "LayerNorm2d"


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.kernel_size == (1, 1))


def is_random(module: nn.Module) -> bool:
    """Dropout and stochastic depth: nothing in inference, so the operator leaves them out."""
    return type(module) is nn.Dropout or type(module).__name__ in ("DropPath", "FocalNetDropPath")

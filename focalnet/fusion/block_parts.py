"""The parts of a block, under the names of each code base.

A block has two residual branches, a focal modulation and an MLP. LayerNorm comes before or after a branch, and an
optional scale after that. `cpu_block` and `gpu_block` run every block of this structure.

These checks can run in every call of every block, so they read the modules' dictionaries directly. The attribute
protocol of nn.Module takes ten times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .context_parts import convolutions, is_pointwise, unusual_level
from .module_checks import is_changed, is_exact_gelu, is_hooked, part
from .part_names import BlockNames, ModulationNames

Role = Callable[[nn.Module], bool]
Norm = tuple["Tensor | None", "Tensor | None", "float | None"]  # weight, bias, eps; all None without norm


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block that operators accept, found by their ``names``.

    Attributes:
        modulation: class of the modulation; None accepts any class with the right structure.
        mlp: class of the MLP; None accepts any class with the right structure.
        forward: function that the modulation's forward may be bound to instead of that of its class.
    """

    names: BlockNames
    modulation: type | None = None
    mlp: type | None = None
    forward: Callable[..., Any] | None = None

    @property
    def _inner(self) -> ModulationNames:
        return self.names.modulation

    def weights_of(self, block: nn.Module) -> tuple[tuple[Any, ...], list[Tensor | None]] | str:
        """The arguments of the operator cpu_block after ``hidden_state``, and the tensors among them.

        Returns the reason as a string if a part of ``block`` is not what the operator expects.
        """
        if reason := self.unusual_part(block):
            return reason
        modulation, mlp = part(block, "modulation"), part(block, "mlp")
        name1, name2, post_norm = self._norms(block)
        levels = convolutions(part(modulation, "focal_layers"))
        focal_weights = [convolution._parameters["weight"] for convolution in levels]
        linears = (
            *_weight_and_bias(part(modulation, self._inner.projection_context)),
            *_weight_and_bias(part(modulation, self._inner.projection_out)),
            *_weight_and_bias(part(mlp, "fc1")),
            *_weight_and_bias(part(mlp, "fc2")),
        )
        projection_in = _weight_and_bias(part(modulation, self._inner.projection_in))
        norm1, norm2, inner_norm = _norm(part(block, name1)), _norm(part(block, name2)), self._inner_norm(modulation)
        scales = (_scale(block, self.names.scales[0]), _scale(block, self.names.scales[1]))
        arguments = (
            *projection_in,
            focal_weights,
            *linears,
            *norm1,
            *norm2,
            *inner_norm,
            *scales,
            post_norm,
            any(getattr(modulation, name, False) for name in self.names.modulation.normalize),
        )
        norms = (*norm1[:2], *norm2[:2], *inner_norm[:2])
        return arguments, [*projection_in, *focal_weights, *linears, *norms, *scales]

    def unusual_part(self, block: nn.Module) -> str | None:
        """Why a part of ``block`` is not what the operator expects, or None if all are."""
        modulation, mlp = part(block, "modulation"), part(block, "mlp")
        reason = (
            _unusual(block, "", self._block_roles, self.forward)
            or _unusual(modulation, "modulation.", self._modulation_roles)
            or _unusual(mlp, "mlp.", self._mlp_roles)
            or _unusual_level(modulation)
            or self._missing_norm(block)
        )
        if reason is None and any(scale != 1 for scale in self._plain_scales(block)):
            return f"{' and '.join(self.names.scales)} are numbers other than 1"
        return reason

    def _missing_norm(self, block: nn.Module) -> str | None:
        """Why a norm in use is missing, or None. An identity is expected only for a norm that is not in use."""
        for name in self._norms(block)[:2]:
            if type(block._modules[name]) is nn.Identity:
                return _is_unusual(name, block._modules[name])
        return None

    def random_part(self, block: nn.Module) -> str | None:
        """Why a part of ``block`` is random although the block is in evaluation mode, or None."""
        for owner in (block, part(block, "modulation"), part(block, "mlp")):
            for name in self.names.random:
                child = owner._modules.get(name)
                if child is not None and child.training and type(child) is not nn.Identity:
                    return f"{name} is in training mode"
        return None

    def _norms(self, block: nn.Module) -> tuple[str, str, bool]:
        """The names of the two norms in use, and whether they come after their branches."""
        post_norm = self.names.post_norm
        if isinstance(post_norm, str):
            return "norm1", "norm2", bool(getattr(block, post_norm, False))
        if type(block._modules["norm1"]) is nn.Identity:
            return *post_norm, True
        return "norm1", "norm2", False

    def _inner_norm(self, modulation: nn.Module) -> Norm:
        flag = self.names.layernorm_flag
        if flag is not None and not getattr(modulation, flag, False):
            return None, None, None
        layernorm = modulation._modules.get(self._inner.layernorm)
        if layernorm is None or type(layernorm) is nn.Identity:
            return None, None, None
        return _norm(layernorm)

    def _plain_scales(self, block: nn.Module) -> list[float]:
        scales = (block.__dict__.get(name) for name in self.names.scales)
        return [scale for scale in scales if isinstance(scale, (int, float))]

    @functools.cached_property
    def _block_roles(self) -> dict[str, Role]:
        scales = self.names.scales if self.names.scale_modules else ()
        return {
            **dict.fromkeys(("norm1", "norm2", *self.names.post_norms), _is_norm),
            "modulation": lambda module: self.modulation in (None, type(module)),
            "mlp": lambda module: self.mlp in (None, type(module)),
            **dict.fromkeys(self.names.random, _is_random),
            **dict.fromkeys(scales, _is_layer_scale),
        }

    @functools.cached_property
    def _modulation_roles(self) -> dict[str, Role]:
        projections = (self._inner.projection_in, self._inner.projection_context, self._inner.projection_out)
        return {
            **dict.fromkeys(projections, _is_linear),
            "focal_layers": lambda module: type(module) is nn.ModuleList,
            self._inner.activation: is_exact_gelu,
            "act": is_exact_gelu,
            self._inner.layernorm: _is_norm,
            **dict.fromkeys(self.names.random, _is_random),
        }

    @functools.cached_property
    def _mlp_roles(self) -> dict[str, Role]:
        return {
            **dict.fromkeys(("fc1", "fc2"), _is_linear),
            self._inner.activation: is_exact_gelu,
            "norm": lambda module: type(module) is nn.Identity,
            **dict.fromkeys(self.names.random, _is_random),
        }


def _unusual(
    owner: nn.Module, prefix: str, roles: dict[str, Role], forward: Callable[..., Any] | None = None
) -> str | None:
    """Why a child of ``owner`` does not fit its role, or None. The modulation may be bound to ``forward``."""
    for name, module in owner._modules.items():
        is_bound = name == "modulation" and forward is not None and _is_bound_to(module, forward)
        if not is_bound and (module is None or not roles.get(name, _never)(module) or is_changed(module)):
            return _is_unusual(prefix + name, module)
    return None


def _is_bound_to(modulation: nn.Module | None, forward: Callable[..., Any]) -> bool:
    """Whether ``modulation`` has no hooks, and its forward is bound to ``forward`` without ``keep_modulator``."""
    if modulation is None or is_hooked(modulation):
        return False
    bound: Any = modulation.__dict__.get("forward")
    if getattr(bound, "func", None) is not forward:
        return False
    return not bound.keywords.get("keep_modulator")


def _unusual_level(modulation: nn.Module) -> str | None:
    focal_layers = part(modulation, "focal_layers")
    name = unusual_level(focal_layers)
    if name is not None:
        return _is_unusual(f"modulation.{name}", modulation.get_submodule(name))
    # A computed weight (parametrisation) is an attribute and not a registered parameter.
    return None if all(map(_has_parameters, convolutions(focal_layers))) else "a weight is computed"


def _is_unusual(name: str, module: nn.Module | None) -> str:
    return f"{name} is {type(module).__name__}, or was wrapped or hooked; expected a plain part of a block"


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def _norm(module: nn.Module) -> Norm:
    eps: Any = module.eps
    return *_weight_and_bias(module), eps


def _scale(block: nn.Module, name: str) -> Tensor | None:
    """The layer scale: a parameter or that of a module, or None for a plain number, which is checked to be 1."""
    if (module := block._modules.get(name)) is not None:
        return module._parameters.get("gamma")
    return block._parameters.get(name)


def _has_parameters(module: nn.Module) -> bool:
    """Whether weight and bias are registered parameters (a tensor or None). Computed ones are attributes instead."""
    parameters = module._parameters
    return "weight" in parameters and "bias" in parameters


def _never(_: nn.Module) -> bool:
    return False


def _is_norm(module: nn.Module) -> bool:
    kind = type(module)
    # LayerNorm2d is timm's. It normalises the channels of a channels-first map; here the same norm runs channels-last.
    if kind is nn.LayerNorm or kind.__name__ == "LayerNorm2d":
        shape: Any = module.normalized_shape
        return len(shape) == 1 and _has_parameters(module)
    return kind is nn.Identity


def _is_linear(module: nn.Module) -> bool:
    is_product = type(module) is nn.Linear or (type(module) is nn.Conv2d and is_pointwise(module))
    return is_product and _has_parameters(module)


def _is_layer_scale(module: nn.Module) -> bool:
    return type(module) is nn.Identity or type(module).__name__ == "LayerScale2d"


def _is_random(module: nn.Module) -> bool:
    """Whether ``module`` is dropout or stochastic depth, which do nothing in inference."""
    kind = type(module)
    return kind is nn.Dropout or kind is nn.Identity or kind.__name__ in ("DropPath", "FocalNetDropPath")

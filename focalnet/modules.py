"""FocalModulation: the layer that replaces self-attention in a FocalNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .backends.registry import requested
from .functional import focal_modulation, packed_focal_modulation
from .fusion.context_parts import convolutions, parameter, unusual_context, weight_of, widest_kernel
from .fusion.module_checks import is_proxy
from .fusion.norm_branches import linear, may_pad, norm_linear
from .onednn import guarded
from .operators.norm_linear import wants_room, with_room

# torch.fx cannot trace through the function, so it becomes one node of the graph.
torch.fx.wrap("focal_modulation")


class FocalModulation(nn.Module):
    """Focal modulation (Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926, section 3.2).

    Parts are named as in transformers' FocalNetModulation: ``projection_in``, ``focal_layers.K.0`` and ``.1``,
    ``activation`` (of the global context), ``projection_context``, ``layernorm``, ``projection_out``. Level l (from 0)
    convolves with a kernel of ``focal_window + focal_factor * l``.

    Args:
        dim: number of channels C.
        focal_window: kernel size of the first level, odd.
        focal_level: number of levels L, at least 1.
        focal_factor: growth of the kernel size from one level to the next, even.
        bias: whether ``projection_in`` and ``projection_context`` have a bias.
        proj_drop: dropout probability after ``projection_out``.
        use_post_layernorm_in_modulation: LayerNorm before ``projection_out``.
        normalize_modulator: divide the aggregated context by L + 1.
        layer_norm_eps: epsilon of that LayerNorm.
        backend: "triton", "cuda", "cpu" or "reference"; None selects the first that can run each call.

    Shapes: input and output ``(B, H, W, C)``, any B, H and W, in the dtype of the parameters.

    Raises:
        ValueError: a size is out of range, or the input is not ``(B, H, W, dim)``.
        TypeError: the input is not a tensor.
        RuntimeError: the requested backend cannot run the call; the message says why.
    """

    def __init__(
        self,
        dim: int,
        focal_window: int = 3,
        focal_level: int = 2,
        focal_factor: int = 2,
        bias: bool = True,
        proj_drop: float = 0.0,
        use_post_layernorm_in_modulation: bool = False,
        normalize_modulator: bool = False,
        layer_norm_eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("focal_window", focal_window), ("focal_level", focal_level)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if focal_window % 2 == 0 or focal_factor % 2 != 0 or focal_factor < 0:
            raise ValueError(
                f"focal_window, focal_factor: expected an odd window and an even factor, so that every kernel is odd, "
                f"got {focal_window} and {focal_factor}"
            )
        self.dim = dim
        self.focal_window = focal_window
        self.focal_level = focal_level
        self.focal_factor = focal_factor
        self.use_post_layernorm_in_modulation = use_post_layernorm_in_modulation
        self.normalize_modulator = normalize_modulator
        self.backend = backend

        # Created in the order of transformers' module, so that one seed gives one set of initial weights.
        self.projection_in = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.projection_context = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)
        self.activation = nn.GELU()
        self.projection_out = nn.Linear(dim, dim)
        self.projection_dropout = nn.Dropout(proj_drop)
        self.kernel_sizes = [focal_window + focal_factor * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(self._focal_layer(dim, kernel_size) for kernel_size in self.kernel_sizes)
        if use_post_layernorm_in_modulation:
            self.layernorm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self._give_room()

    def _give_room(self) -> None:
        """Let the parameters of projection_in lie where a product can go on reading rows of zeros."""
        for own in self.projection_in.parameters(recurse=False):
            if type(own) is nn.Parameter and wants_room(own):
                own.data = with_room(own.data)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FocalModulation:
        """Called by ``to``, ``half`` and the like. Parameters that got new memory get room there."""
        before = [own.data_ptr() for own in self.projection_in.parameters(recurse=False)]
        super()._apply(fn, recurse)
        if before != [own.data_ptr() for own in self.projection_in.parameters(recurse=False)]:
            self._give_room()
        return self

    @staticmethod
    def _focal_layer(dim: int, kernel_size: int) -> nn.Sequential:
        conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        return nn.Sequential(conv, nn.GELU())

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``hidden_state`` (B, H, W, C) -> (B, H, W, C)."""
        if not is_proxy(hidden_state):
            self._check(hidden_state)
        padded = may_pad(self.projection_in, hidden_state, self.backend)
        if padded:
            return self._modulate(linear(self.projection_in, hidden_state, self.backend, padded), padded)
        return self._modulate(self.projection_in(hidden_state))

    def _check(self, hidden_state: object) -> None:
        if not isinstance(hidden_state, Tensor):
            kind = f"{type(hidden_state).__module__}.{type(hidden_state).__qualname__}"
            raise TypeError(f"hidden_state: expected a torch.Tensor (B, H, W, {self.dim}), got {kind}")
        if hidden_state.ndim != 4 or hidden_state.shape[-1] != self.dim:
            raise ValueError(
                f"hidden_state: expected shape (B, H, W, {self.dim}), got {tuple(hidden_state.shape)}; "
                f"channels come last: call .permute(0, 2, 3, 1) on an NCHW tensor"
            )

    def of_normed(self, norm: nn.Module, hidden_state: Tensor, *, backend: str | None = None) -> Tensor:
        """``self(norm(hidden_state))``, (B, H, W, C) -> (B, H, W, C).

        In training the output of ``norm`` is not saved for backward.
        """
        backend = backend or self.backend
        padded = may_pad(self.projection_in, hidden_state, backend)
        return self._modulate(norm_linear(norm, self.projection_in, hidden_state, backend, padded), padded)

    def _modulate(self, projected: Tensor, padded: bool = False) -> Tensor:
        q, ctx, gates = projected.split([self.dim, self.dim, self.focal_level + 1], dim=-1)
        # The operator reads weights and calls no module, so replaced or hooked modules need the other path.
        changed = unusual_context(self, "projection_context", "activation")
        if changed is not None:
            out = self._module_by_module(q, ctx, gates, changed)
        elif padded and torch.is_grad_enabled():
            out = packed_focal_modulation(projected, *self._operands(), **self._settings())
        else:
            out = self._fused(q, ctx, gates)
        if self.use_post_layernorm_in_modulation:
            return self.projection_dropout(norm_linear(self.layernorm, self.projection_out, out, self.backend))
        return self.projection_dropout(linear(self.projection_out, out, self.backend))

    def _fused(self, q: Tensor, ctx: Tensor, gates: Tensor) -> Tensor:
        return focal_modulation(q, ctx, gates, *self._operands(), **self._settings())

    def _operands(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        focal_weights = [weight_of(convolution) for convolution in convolutions(self.focal_layers)]
        return focal_weights, weight_of(self.projection_context), parameter(self.projection_context, "bias")

    def _settings(self) -> dict[str, Any]:
        return {"normalize_modulator": self.normalize_modulator, "backend": self.backend}

    def _module_by_module(self, q: Tensor, ctx: Tensor, gates: Tensor, changed: str) -> Tensor:
        backend = requested(self.backend)
        if backend not in (None, "reference"):
            raise RuntimeError(
                f"backend {backend!r} cannot run this FocalModulation: {changed} was replaced, wrapped or hooked, so "
                f"its modules must be called one by one. Omit the backend or undo the change."
            )
        ctx, gates = ctx.permute(0, 3, 1, 2), gates.permute(0, 3, 1, 2)
        agg: Any = 0
        with guarded(ctx, widest_kernel(self.focal_layers)):
            for level, layer in enumerate(self.focal_layers):
                ctx = layer(ctx)
                agg = agg + ctx * gates[:, level : level + 1]
        agg = agg + self.activation(ctx.mean((2, 3), keepdim=True)) * gates[:, self.focal_level :]
        if self.normalize_modulator:
            agg = agg / (self.focal_level + 1)
        return q * self.projection_context(agg).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        kernels = ", ".join(map(str, self.kernel_sizes))
        return f"dim={self.dim}, kernels=({kernels}), normalize_modulator={self.normalize_modulator}"

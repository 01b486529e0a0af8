"""FocalModulation: the layer that stands where a transformer has self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import focal_modulation


class FocalModulation(nn.Module):
    """Focal modulation (Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926, section 3.2).

    Parameters are named as in transformers' FocalNetModulation: ``projection_in``, ``focal_layers.K.0``,
    ``projection_context``, ``layernorm``, ``projection_out``. Level l (from 0) convolves with a kernel of
    ``focal_window + focal_factor * l``.

    Args:
        dim: number of channels C.
        focal_window: kernel size of the first level, odd.
        focal_level: number of levels L, at least 1.
        focal_factor: how much the kernel grows from level to level, even.
        bias: whether ``projection_in`` and ``projection_context`` have one.
        proj_drop: dropout probability after ``projection_out``.
        use_post_layernorm_in_modulation: LayerNorm before ``projection_out``.
        normalize_modulator: divide the aggregated context by L + 1.
        layer_norm_eps: epsilon of that LayerNorm.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the first that can run a call.

    Shapes: input and output ``(B, H, W, C)``, any B, H and W, in the dtype of the parameters.

    Raises:
        ValueError: a size is out of range, or the input is not ``(B, H, W, dim)``.
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
        self.projection_out = nn.Linear(dim, dim)
        self.projection_dropout = nn.Dropout(proj_drop)
        self.focal_layers = nn.ModuleList(
            self._focal_layer(dim, focal_window + focal_factor * level) for level in range(focal_level)
        )
        if use_post_layernorm_in_modulation:
            self.layernorm = nn.LayerNorm(dim, eps=layer_norm_eps)

    @staticmethod
    def _focal_layer(dim: int, kernel_size: int) -> nn.Sequential:
        conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        return nn.Sequential(conv, nn.GELU())

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``hidden_state`` (B, H, W, C) -> (B, H, W, C)."""
        if hidden_state.ndim != 4 or hidden_state.shape[-1] != self.dim:
            raise ValueError(
                f"hidden_state: expected shape (B, H, W, {self.dim}), got {tuple(hidden_state.shape)}; "
                f"channels come last here, NCHW tensors want .permute(0, 2, 3, 1)"
            )
        projected = self.projection_in(hidden_state)
        q, ctx, gates = projected.split([self.dim, self.dim, self.focal_level + 1], dim=-1)
        out = focal_modulation(
            q,
            ctx,
            gates,
            [level[0].weight for level in self.focal_layers],
            self.projection_context.weight,
            self.projection_context.bias,
            normalize_modulator=self.normalize_modulator,
            backend=self.backend,
        )
        if self.use_post_layernorm_in_modulation:
            out = self.layernorm(out)
        return self.projection_dropout(self.projection_out(out))

    def extra_repr(self) -> str:
        kernels = ", ".join(str(level[0].kernel_size[0]) for level in self.focal_layers)
        return f"dim={self.dim}, kernels=({kernels}), normalize_modulator={self.normalize_modulator}"

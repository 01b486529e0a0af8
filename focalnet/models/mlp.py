"""The MLP, the second branch of a block, and DropPath, the stochastic depth of both branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..configuration import FocalNetConfig, activation
from ..fusion.gpu_block import draw
from ..fusion.norm_branches import norm_mlp


class FocalNetMlp(nn.Module):
    """Two linear layers with ``hidden_act`` between them, (..., dim) -> (..., dim)."""

    def __init__(self, config: FocalNetConfig, dim: int) -> None:
        super().__init__()
        hidden_dim = int(dim * config.mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.activation = activation(config.hidden_act)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_state: Tensor) -> Tensor:
        fused = norm_mlp(None, self, hidden_state)
        return self._by_modules(hidden_state) if fused is None else fused

    def of_normed(
        self, norm: nn.Module, hidden_state: Tensor, normed: Tensor | None = None, *, backend: str | None = None
    ) -> Tensor:
        """``self(norm(hidden_state))``, (..., dim) -> (..., dim).

        In training the output of ``norm`` is not saved for backward. ``normed`` is ``norm(hidden_state)`` if the
        caller has computed it already.
        """
        fused = norm_mlp(norm, self, hidden_state, normed, backend)
        if fused is not None:
            return fused
        return self._by_modules(norm(hidden_state) if normed is None else normed)

    def _by_modules(self, hidden_state: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.activation(self.fc1(hidden_state)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv:1603.09382): in training a branch is dropped for random whole samples.

    (B, ...) -> (B, ...). Kept samples are divided by the probability of keeping them.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_state: Tensor) -> Tensor:
        if self.drop_prob == 1.0 and self.training:
            return torch.zeros_like(hidden_state)
        kept = self.draw(hidden_state, hidden_state.dtype)
        return hidden_state if kept is None else hidden_state.div(self.keep_prob) * kept

    @property
    def keep_prob(self) -> float:
        return 1 - self.drop_prob

    def draw(self, hidden_state: Tensor, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, ...) of ``dtype``: 1 for samples of (B, ...) whose branch is kept, else 0. None if all are kept."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        return draw(hidden_state, self.keep_prob, dtype)

    def add(self, hidden_state: Tensor, update: Tensor) -> Tensor:
        """``hidden_state + forward(update)``, to the bit. In float32 training that takes one pass instead of three."""
        is_single = isinstance(update, Tensor) and hidden_state.dtype == update.dtype == torch.float32
        if not (is_single and self.training and 0 < self.drop_prob < 1):
            return hidden_state + self(update)
        kept = draw(update, self.keep_prob, update.dtype)
        return torch.addcdiv(hidden_state, update, kept.mul(self.keep_prob).masked_fill(kept == 0, math.inf))

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"

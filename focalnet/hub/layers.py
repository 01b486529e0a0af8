"""The layers that `kernels.kernelize` puts in the place of a model's own: stateless, they take over its parts."""

from torch import Tensor, nn

from ..patching import modulation


class FocalNetModulation(nn.Module):
    """Runs transformers' FocalNetModulation on focalnet's operators, (B, H, W, C) -> (B, H, W, C).

    Only ``forward`` is used, on an instance of transformers' class: parameters and settings are those that are there.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_state: Tensor) -> Tensor:
        return modulation.forward(self, hidden_state, source="transformers")

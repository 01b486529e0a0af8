"""The layers that `kernels.kernelize` swaps into a model. They are stateless and use the parameters of the model."""

from torch import Tensor, nn

from ..patching import modulation


class FocalNetModulation(nn.Module):
    """Runs transformers' FocalNetModulation on focalnet's operators, (B, H, W, C) -> (B, H, W, C).

    `kernels` uses only ``forward``, with an instance of transformers' class as ``self``. Parameters and settings are
    those of that instance.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_state: Tensor) -> Tensor:
        return modulation.forward(self, hidden_state, source="transformers")

"""Networks that take a context beside their samples, for CAVIA: what a task is about, in a few numbers.

Legend: B samples, C context parameters, F filters, H W image axes, N ways.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.checks import require_counts
from dmaml_pl.networks.conv4 import Conv4
from dmaml_pl.networks.mlp import MLP


class ContextMLP(MLP):
    """An MLP whose inputs are a sample's and a context, as in Zintgraf et al. 2019, section 5.1.

    Args:
        inputs: size of a sample.
        hidden: widths of the hidden layers.
        outputs: size of a prediction.
        context: C, size of the context; 5 in the paper's sinusoid regression. The attribute is the context itself,
            (C,), zero: what CAVIA adapts, and nothing learns.

    Raises:
        ConfigError: a width is not greater than zero.

    Examples:
        >>> ContextMLP(context=5)(torch.rand(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, inputs: int = 1, hidden: Sequence[int] = (40, 40), outputs: int = 1, context: int = 5) -> None:
        require_counts(**{"model.network.inputs": inputs, "model.network.context": context})
        super().__init__(inputs + context, hidden, outputs)
        self.context = _context(context)

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer is given (B, F) of samples (B, inputs)."""
        return super().embed(self._beside(x))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (B, outputs) of samples (B, inputs)."""
        return super().forward(self._beside(x))

    def _beside(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.expand(x.shape[0], -1)], dim=1)


class ContextConv4(Conv4):
    """A Conv4 whose third block's feature maps are scaled and shifted by a context, as in Zintgraf et al. 2019.

    Feature-wise linear modulation (Perez et al. 2018): scale and shift of each of the F maps are a linear function of
    the context. They are applied after the normalization; the paper's code pools before that, which is the same where
    a scale is positive.

    Args:
        context: C, size of the context; 100 in the paper.
        filters: F, of each convolution.
        settings: those of `Conv4`.

    Raises:
        ConfigError: a setting that cannot work.

    Examples:
        >>> ContextConv4(context=10, filters=8)(torch.rand(5, 1, 28, 28)).shape
        torch.Size([5, 5])
    """

    def __init__(self, context: int = 100, filters: int = 64, **settings: Any) -> None:
        super().__init__(filters=filters, **settings)
        require_counts(**{"model.network.context": context})
        activations = [number for number, layer in enumerate(self.features) if isinstance(layer, nn.ReLU)]
        self.features.insert(activations[2], FiLM(context, filters))


class FiLM(nn.Module):
    """Feature maps (B, F, H, W) times a scale plus a shift, which follow from a context.

    Args:
        context: C. The attribute is the context itself, (C,), zero: what CAVIA adapts, and nothing learns.
        filters: F.

    Attributes:
        generator: from the context to F scales and F shifts.
    """

    def __init__(self, context: int, filters: int) -> None:
        super().__init__()
        self.context = _context(context)
        self.generator = nn.Linear(context, 2 * filters)
        nn.init.kaiming_uniform_(self.generator.weight, nonlinearity="linear")  # as the paper's code

    def forward(self, x: Tensor) -> Tensor:
        """The maps, scaled and shifted."""
        scale, shift = self.generator(self.context).view(2, -1, 1, 1)
        out: Tensor = scale * x + shift
        return out


def _context(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size), requires_grad=False)

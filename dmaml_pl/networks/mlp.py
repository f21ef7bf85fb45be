"""The multilayer perceptron of the MAML paper's sinusoid regression."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dmaml_pl.checks import require_all_counts, require_counts


class MLP(nn.Module):
    """Linear layers with ReLU between them: 1-40-40-1 by default, as in Finn et al. 2017, section 5.1.

    Args:
        inputs: size of a sample.
        hidden: widths of the hidden layers.
        outputs: size of a prediction.

    Raises:
        ConfigError: a width is not greater than zero.

    Examples:
        >>> MLP(inputs=1, hidden=[40, 40], outputs=1)(torch.rand(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, inputs: int = 1, hidden: Sequence[int] = (40, 40), outputs: int = 1) -> None:
        super().__init__()
        require_counts(**{"model.network.inputs": inputs, "model.network.outputs": outputs})
        require_all_counts("model.network.hidden", hidden)
        widths = [inputs, *hidden, outputs]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for width, following in pairwise(widths[1:]):
            layers += [nn.ReLU(), nn.Linear(width, following)]
        self.layers = nn.Sequential(*layers)

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer is given (B, F) of samples (B, inputs)."""
        out: Tensor = self.layers[:-1](x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (B, outputs) of samples (B, inputs)."""
        out: Tensor = self.layers(x)
        return out

"""The four-block convolutional network of few-shot image classification.

Legend: B samples, C H W image axes, N ways.
"""

from typing import Literal

from torch import Tensor, nn

from dmaml_pl.checks import require_positive
from dmaml_pl.errors import ConfigError

Normalization = Literal["batch", "group", "none"]


class Conv4(nn.Module):
    """Four times 3x3 convolution, normalization, ReLU, 2x2 max-pool; then a linear layer (Vinyals et al. 2016).

    Args:
        ways: N, outputs.
        channels: C, input channels.
        image_size: H and W in pixels, at least 16.
        filters: filters of each convolution; 64 in the MAML paper for Omniglot, 32 for mini-ImageNet.
        normalization: "batch" normalizes by the statistics of the samples at hand, in training and testing alike, as
            the MAML paper does; queries then see each other (transductive). "group" (4 groups) normalizes each sample
            alone (inductive). "none" leaves it out.

    Raises:
        ConfigError: a size that cannot work.
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        normalization: Normalization = "batch",
    ) -> None:
        super().__init__()
        require_positive(**{"model.network.ways": ways, "model.network.channels": channels})
        if image_size < 16:
            raise ConfigError(f"model.network.image_size is {image_size}, but must be at least 16.")
        if filters < 4 or filters % 4:
            raise ConfigError(f"model.network.filters is {filters}, but must be a multiple of 4.")
        layers: list[nn.Module] = []
        for incoming in (channels, filters, filters, filters):
            layers += [
                nn.Conv2d(incoming, filters, kernel_size=3, padding=1),
                *_normalization(normalization, filters),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(filters * (image_size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of images (B, C, H, W)."""
        out: Tensor = self.head(self.features(x).flatten(1))
        return out


def _normalization(kind: Normalization, filters: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(filters, track_running_stats=False)]
    if kind == "group":
        return [nn.GroupNorm(4, filters)]
    return []

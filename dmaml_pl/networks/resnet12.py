"""The residual network with twelve convolutions, few-shot image classification's standard.

Legend: B samples, C H W image axes, F features, N ways.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dmaml_pl.checks import require_all_counts, require_counts
from dmaml_pl.errors import ConfigError

SLOPE = 0.1
"""Of the leaky ReLUs, for negative values."""


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, each followed by a 2x2 max-pool; then a linear layer.

    As in TADAM (Oreshkin et al. 2018, arXiv:1805.10123) and, with these widths, in MetaOptNet (Lee et al. 2019,
    arXiv:1904.03758): batch norm after each convolution, leaky ReLU of 0.1, the features being the mean over the pixels
    that are left. MetaOptNet's DropBlock is left out, as a network that adapts draws it anew at each step. Batch norm
    normalizes by the statistics of the samples at hand, as MAML's `Conv4`.

    Args:
        ways: N, outputs.
        channels: C, input channels.
        widths: filters of the four blocks; 64, 160, 320, 640 in MetaOptNet, 64, 128, 256, 512 in TADAM. The last is F.

    Raises:
        ConfigError: a setting that cannot work.

    Examples:
        >>> ResNet12(ways=5, widths=[4, 8, 16, 32])(torch.rand(2, 3, 84, 84)).shape
        torch.Size([2, 5])
    """

    def __init__(self, ways: int = 5, channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640)) -> None:
        super().__init__()
        require_counts(**{"model.network.ways": ways, "model.network.channels": channels})
        require_all_counts("model.network.widths", widths)
        if len(widths) != 4:
            raise ConfigError(
                f"model.network.widths has {len(widths)} numbers, but must have one for each of 4 blocks."
            )
        self.blocks = nn.Sequential(
            *(_Block(before, width) for before, width in zip([channels, *widths], widths, strict=False))
        )
        self.head = nn.Linear(widths[-1], ways)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W), of which H and W are at least 16."""
        out: Tensor = self.blocks(x)
        return out.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of images (B, C, H, W)."""
        out: Tensor = self.head(self.embed(x))
        return out


class _Block(nn.Module):
    """Three convolutions beside a shortcut, which a 1x1 convolution brings to the same width."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, incoming in enumerate((before, width, width)):
            layers += [nn.Conv2d(incoming, width, 3, padding=1, bias=False), _norm(width)]
            layers += [nn.LeakyReLU(SLOPE)] if number < 2 else []
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), _norm(width))
        self.end = nn.Sequential(nn.LeakyReLU(SLOPE), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.convolutions(x) + self.shortcut(x))
        return out


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, track_running_stats=False)

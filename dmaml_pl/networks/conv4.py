"""The four-block convolutional network of few-shot image classification.

Legend: B samples, C H W image axes, F features, N ways.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dmaml_pl.checks import require_counts, require_one_of
from dmaml_pl.errors import ConfigError

Normalization = Literal["batch", "batch_shift", "group", "none"]
Pooling = Literal["max", "stride"]
Initialization = Literal["pytorch", "maml"]

EPS_OF_MAML = 0.001
"""Batch norm's in the MAML paper's code, which takes TensorFlow's default."""


class Conv4(nn.Module):
    """Four times 3x3 convolution, normalization, ReLU, 2x2 max-pool; then a linear layer (Vinyals et al. 2016).

    The MAML paper's code (Finn et al. 2017, github.com/cbfinn/maml) has for Omniglot `pooling="stride"`,
    `normalization="batch_shift"`, `initialization="maml"` and 64 filters, for mini-ImageNet the same with
    `pooling="max"` and 32 filters. The shifts of its batch norms are meta-learned, but do not adapt:
    `adapts: ["*", "!features.*.bias"]`, which leaves out the biases of the convolutions as well; batch norm takes these
    away anyway.

    Args:
        ways: N, outputs.
        channels: C, input channels.
        image_size: H and W in pixels, at least 16.
        filters: filters of each convolution; 64 in the MAML paper for Omniglot, 32 for mini-ImageNet.
        normalization: "batch" normalizes by the statistics of the samples at hand, in training and testing alike, as
            the MAML paper does; queries then see each other (transductive). "batch_shift" is the same with a learned
            shift and no scale, and an epsilon of 0.001. "group" (4 groups) normalizes each sample alone (inductive).
            "none" leaves it out.
        pooling: "max" pools each block's output; "stride" has convolutions of stride 2 instead, and takes the mean over
            the pixels that are left. TensorFlow pads an even size at its end only, PyTorch here at both.
        initialization: "pytorch" is PyTorch's own; "maml" that of the MAML paper's code: Glorot's for convolutions,
            zero for biases, and for the head N(0, 1) after "stride", Glorot's after "max".

    Raises:
        ConfigError: a setting that cannot work.

    Examples:
        >>> Conv4(ways=5, channels=1, image_size=28, filters=32)(torch.rand(25, 1, 28, 28)).shape
        torch.Size([25, 5])
    """

    def __init__(
        self,
        ways: int = 5,
        channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        normalization: Normalization = "batch",
        pooling: Pooling = "max",
        initialization: Initialization = "pytorch",
    ) -> None:
        super().__init__()
        require_counts(**{"model.network.ways": ways, "model.network.channels": channels})
        require_one_of("model.network.normalization", normalization, ("batch", "batch_shift", "group", "none"))
        require_one_of("model.network.pooling", pooling, ("max", "stride"))
        require_one_of("model.network.initialization", initialization, ("pytorch", "maml"))
        if image_size < 16:
            raise ConfigError(f"model.network.image_size is {image_size}, but must be at least 16.")
        if filters < 4 or filters % 4:
            raise ConfigError(f"model.network.filters is {filters}, but must be a multiple of 4.")
        self.pooling = pooling
        strided = pooling == "stride"
        layers: list[nn.Module] = []
        for incoming in (channels, filters, filters, filters):
            layers += [
                nn.Conv2d(incoming, filters, kernel_size=3, stride=2 if strided else 1, padding=1),
                *_normalization(normalization, filters),
                nn.ReLU(),
                *([] if strided else [nn.MaxPool2d(2)]),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(filters if strided else filters * (image_size // 16) ** 2, ways)
        if initialization == "maml":
            self._initialize_as_maml()

    def _initialize_as_maml(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if self.pooling == "stride":
            nn.init.normal_(self.head.weight)

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W)."""
        out: Tensor = self.features(x)
        return out.mean((2, 3)) if self.pooling == "stride" else out.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of images (B, C, H, W)."""
        out: Tensor = self.head(self.embed(x))
        return out


def _normalization(kind: Normalization, filters: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(filters, track_running_stats=False)]
    if kind == "batch_shift":
        norm = nn.BatchNorm2d(filters, eps=EPS_OF_MAML, track_running_stats=False)
        # A constant in its place, so that the engines' faster batch norm takes it.
        del norm.weight
        norm.register_buffer("weight", torch.ones(filters), persistent=False)
        return [norm]
    if kind == "group":
        return [nn.GroupNorm(4, filters)]
    return []

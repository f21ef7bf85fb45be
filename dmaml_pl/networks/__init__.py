"""Plain networks to meta-learn; any other `nn.Module` does as well."""

from dmaml_pl.networks.conv4 import Conv4
from dmaml_pl.networks.mlp import MLP
from dmaml_pl.networks.resnet12 import ResNet12

__all__ = ["MLP", "Conv4", "ResNet12"]

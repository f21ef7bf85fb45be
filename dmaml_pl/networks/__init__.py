"""Networks to meta-learn, and pretrained bodies; any other `nn.Module` does as well."""

from dmaml_pl.networks.backbone import Backbone
from dmaml_pl.networks.context import ContextConv4, ContextMLP
from dmaml_pl.networks.conv4 import Conv4
from dmaml_pl.networks.lora import LoRA
from dmaml_pl.networks.mlp import MLP
from dmaml_pl.networks.resnet12 import ResNet12

__all__ = ["MLP", "Backbone", "ContextConv4", "ContextMLP", "Conv4", "LoRA", "ResNet12"]

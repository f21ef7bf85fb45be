"""Low-rank adapters: a small number of new weights beside those of a pretrained network.

Legend: B samples, F features, r rank, O outputs and I inputs of a layer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmaml_pl.checks import require_counts, require_kind, require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.networks.names import head_of, select


class LoRA(nn.Module):
    """A network whose layers have low-rank adapters: W x + scale B A x (Hu et al. 2021, arXiv:2106.09685).

    A is (r, I) and begins at random, B is (O, r) and begins at zero, so that the network starts as it was. A
    convolution's A is a convolution of the same kind to r channels, its B one of 1x1.

    The network is `body`, and its head, where it has an embedding and a head, `head`; adapters are the `lora_a` and
    `lora_b` of their layer, whose own weights are its `base`. `model.freeze: ["body.*", "!*lora*"]` keeps all else as
    it is, and `model.algorithm.adapts: ["*lora*", "head.*"]` lets them adapt.

    Args:
        network: gets the adapters.
        rank: r.
        scale: of what the adapters add; alpha / r in the paper.
        layers: which linear layers and convolutions get some, as patterns of their names such as `blocks.*.attn.*`; one
            that begins with `!` takes out again. By default all. The head gets none in any case, nor do convolutions of
            groups, layers of a class of their own, and PyTorch's attention and transformer layers.

    Raises:
        ConfigError: the rank or the scale is not greater than zero, or there is no such layer.

    Examples:
        >>> module = MetaLearning(LoRA(MLP(hidden=[40, 40]), rank=2), MAML(adapts=["*lora*"]))
        >>> module.learner.states()
        {'frozen': 0, 'learned': 1761, 'adapting': 242}
    """

    def __init__(
        self, network: nn.Module, rank: int = 4, scale: float = 1.0, layers: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        require_counts(**{"model.network.rank": rank})
        require_positive(**{"model.network.scale": scale})
        require_kind("model.network.network", network, nn.Module, "Conv4()")
        found = dict(_layers(network))
        if not found:
            raise ConfigError(
                f"model.network.network is {type(network).__name__}, which has no layer but its head that LoRA knows."
            )
        for name in select(list(found), ["*"] if layers is None else layers, "model.network.layers"):
            network.set_submodule(name, _Adapted(name, found[name], rank, scale))
        head = network._modules.get("head")  # noqa: SLF001 - and no attribute of another kind
        if head is not None and callable(getattr(type(network), "embed", None)):
            network.head = nn.Identity()  # what is left gives the embedding
        else:
            head = nn.Identity()
        self.body = network
        self.head = head

    def embed(self, x: Tensor) -> Any:
        """Features (B, F) of samples (B, ...); of a network without an embedding its output."""
        return self.body(x)

    def forward(self, x: Tensor) -> Any:
        """What the network gives of samples (B, ...)."""
        return self.head(self.embed(x))


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that can have adapters, by name."""
    head = head_of(network)
    closed = [name for name, m in network.named_modules() if isinstance(m, _READ_WEIGHTS)]
    for name, layer in network.named_modules():
        plain = type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)
        if name and plain and not any(f"{name}.".startswith(f"{outer}.") for outer in (head, *closed)):
            yield name, layer


_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""These read the weights of their layers without running them, which would leave adapters out."""


class _Adapted(nn.Module):
    """A layer, and beside it what its adapters add."""

    def __init__(self, name: str, base: nn.Linear | nn.Conv2d, rank: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.scale = scale
        self.base = base
        like = base.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, *like.shape[1:]))
        self.lora_b = nn.Parameter(like.new_zeros(len(like), rank, *[1] * (like.ndim - 2)))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """Asked for by modules that would leave the adapters out.

        Raises:
            ConfigError: always.
        """
        last = self.name.rpartition(".")[2]
        raise ConfigError(
            f"model.network.layers takes in {self.name}, whose weights the network reads without running the layer, so "
            f"that adapters would have no effect: leave it out, as {[f'!*{last}']} does."
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives of x, which its adapters change."""
        if isinstance(self.base, nn.Linear):
            added = F.linear(F.linear(x, self.lora_a), self.lora_b)
        else:
            added = F.conv2d(self.base._conv_forward(x, self.lora_a, None), self.lora_b)  # noqa: SLF001 - as its own
        out: Tensor = torch.add(self.base(x), added, alpha=self.scale)
        return out

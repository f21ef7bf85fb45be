"""Inner loops of a part of the network, chosen by the names of its weights."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.networks.names import head_of


class ANIL(MAML):
    """Almost No Inner Loop (Raghu et al. 2020, arXiv:1909.09157): the head alone adapts, the body is meta-learned.

    Its settings are those of `MAML`; `adapts` is the last layer that has weights, unless it is set.

    Examples:
        >>> module = MetaLearning(Conv4(filters=8), ANIL(inner_lr=0.1, inner_steps=5), "classification")
        >>> module.learner.states()
        {'frozen': 0, 'learned': 1896, 'adapting': 45}
    """

    def attach(self, network: nn.Module) -> None:
        """Choose the head."""
        if self._patterns is None:
            self._patterns = [_below(head_of(network))]
        super().attach(network)

    def learn2learn(self, package: ModuleType, network: nn.Module) -> Any:
        """`learn2learn.algorithms.MAML` of the head, the body outside, as in learn2learn's examples of ANIL."""
        head, own = head_of(network), [name for name, _ in network.named_parameters()]
        below = [name for name in own if name.startswith(f"{head}.")]
        if self.adapts != below or not hasattr(network, "embed") or self.inner_optimizer is not None:
            return None
        wrapped = package.algorithms.MAML(network.get_submodule(head), lr=self.inner_lr, first_order=self.first_order)
        return _BodyAndHead(network, wrapped)


class BOIL(MAML):
    """Body Only update in Inner Loop (Oh et al. 2021, arXiv:2008.08882): all but the head adapts.

    Its settings are those of `MAML`; `adapts` is all but the last layer that has weights, unless it is set.

    Examples:
        >>> module = MetaLearning(Conv4(filters=8), BOIL(inner_lr=0.1), "classification")
        >>> module.learner.states()
        {'frozen': 0, 'learned': 45, 'adapting': 1896}
    """

    def attach(self, network: nn.Module) -> None:
        """Choose the body."""
        if self._patterns is None:
            self._patterns = [f"!{_below(head_of(network))}"]
        super().attach(network)


class _BodyAndHead:
    """A head in a wrapper of learn2learn's, below a body that does not adapt; used like such a wrapper."""

    def __init__(self, network: Any, head: Any) -> None:
        self._network = network
        self._head = head

    def clone(self) -> "_BodyAndHead":
        return _BodyAndHead(self._network, self._head.clone())

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        self._head.adapt(loss, first_order=first_order)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._head(self._network.embed(x))
        return out


def _below(layer: str) -> str:
    return f"{layer}.*" if layer else "*"

"""A network with the algorithm that adapts it: what is meta-learned, merged and kept."""

from typing import Any

from torch import Tensor, nn

from dmaml_pl.algorithms.base import OWN, Algorithm, Weights
from dmaml_pl.errors import ConfigError


class MetaLearner(nn.Module):
    """Joins a network and an algorithm; its parameters are the meta-weights, the network's first.

    Args:
        network: from samples (B, ...) to predictions.
        algorithm: is attached to the network.

    Raises:
        ConfigError: the network's names cannot be told from the algorithm's, or nothing of it adapts.

    Examples:
        >>> from dmaml_pl.learner import MetaLearner
        >>> learner = MetaLearner(nn.Linear(1, 1), MetaSGD(inner_lr=0.01))
        >>> list(learner.meta())
        ['weight', 'bias', 'algorithm.rates.0', 'algorithm.rates.1']
    """

    def __init__(self, network: nn.Module, algorithm: Algorithm) -> None:
        super().__init__()
        if any(f"{name}." == OWN for name, _ in network.named_children()):
            raise ConfigError(
                f"model.network has a module named {OWN[:-1]}, which is kept for the parameters of model.algorithm: "
                "give it another name."
            )
        algorithm.attach(network)
        self.network = network
        self.algorithm = algorithm
        self.register_load_state_dict_pre_hook(_names_of_today)  # type: ignore[no-untyped-call]  # PyTorch's to type

    def forward(self, x: Tensor) -> Any:
        """The unadapted network's predictions (B, ...) of samples (B, ...)."""
        return self.network(x)

    def meta(self) -> Weights:
        """All meta-learned tensors by name, the very ones: parameters of the network, and what the algorithm owns."""
        own = [*self.algorithm.named_parameters(), *self.algorithm.named_buffers()]
        return dict(self.network.named_parameters()) | {f"{OWN}{name}": tensor for name, tensor in own}

    def param_groups(self) -> list[dict[str, Any]]:
        """What a meta-optimizer takes: one group, and one for the algorithm's parameters if their rate is another.

        Frozen parameters are in none.
        """
        networks, own = (
            [p for p in module.parameters() if p.requires_grad] for module in (self.network, self.algorithm)
        )
        if self.algorithm.meta_lr is None or not own:
            return [{"params": [*networks, *own]}]
        return [{"params": networks}, {"params": own, "lr": self.algorithm.meta_lr}]

    def states(self) -> dict[str, int]:
        """How many parameters are frozen, are learned but do not adapt, and adapt to each task."""
        counts = {"frozen": 0, "learned": 0, "adapting": 0}
        adapts = set(self.algorithm.adapts)
        for name, weight in self.meta().items():
            if isinstance(weight, nn.Parameter):  # and no buffer of the algorithm's
                state = "adapting" if name in adapts else "learned" if weight.requires_grad else "frozen"
                counts[state] += weight.numel()
        return counts


def _names_of_today(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints of version 0.1 load, in which the network stood inside learn2learn's wrapper."""
    before = f"{prefix}module."
    for name in [name for name in state if name.startswith(before)]:
        state[f"{prefix}network.{name.removeprefix(before)}"] = state.pop(name)

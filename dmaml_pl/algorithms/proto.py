"""Heads made of prototypes: ProtoNet, where that is all, and ProtoMAML, where it is the start of an inner loop.

Both tell any number of classes apart, in validation and test as many as they like, and do not prefer one label to
another, as a head of learned weights does.

Legend: T tasks, S support samples, F features, N ways.
"""

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.base import Algorithm, Tasks, Weights
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.errors import ConfigError
from dmaml_pl.networks.names import HEAD, is_split

WEIGHT, BIAS = f"{HEAD}weight", f"{HEAD}bias"


class ProtoNet(Algorithm):
    """Prototypical networks (Snell, Swersky and Zemel 2017, arXiv:1703.05175): there is no inner loop.

    A class's prototype c is the mean of the features of its support samples. A query z belongs to it by
    -|z - c|^2 = 2 c z - |c|^2 - |z|^2, whose last term is the same for all classes and left out: what remains is a
    linear head, which takes the place of the network's own. The body is meta-learned, by the cross-entropy of the
    queries.

    Examples:
        >>> module = MetaLearning(Conv4(filters=8), ProtoNet(), "classification")
        >>> adapted = FewShotLearner(module).adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> adapted.predict(torch.rand(9, 1, 28, 28)).shape
        torch.Size([9, 5])
    """

    any_ways = True

    def __init__(self) -> None:
        super().__init__(inner_steps=0)

    def attach(self, network: nn.Module) -> None:
        """The head differs from task to task.

        Raises:
            ConfigError: the network is not an embedding and a linear head.
        """
        _require_linear_head(self, network)
        self.adapts = [WEIGHT, BIAS]

    def start(self, meta: Weights, tasks: Tasks) -> Weights:
        """The head of a task's prototypes."""
        return head_of_prototypes(self, meta, tasks)

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """There is no step that changes anything."""
        return fast


class ProtoMAML(MAML):
    """MAML whose head begins as ProtoNet's, 2 c and -|c|^2 (Triantafillou et al. 2020, arXiv:1903.03096).

    From there all adapts. The meta-gradient goes through the prototypes, too, also where it is of first order.

    Its settings are those of `MAML`; the head adapts whatever `adapts` says.

    Examples:
        >>> module = MetaLearning(Conv4(filters=8), ProtoMAML(inner_lr=0.1), "classification")
        >>> adapted = FewShotLearner(module).adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> adapted.predict(torch.rand(9, 1, 28, 28)).shape
        torch.Size([9, 5])
    """

    any_ways = True

    def attach(self, network: nn.Module) -> None:
        """Choose what adapts beside the head.

        Raises:
            ConfigError: the network is not an embedding and a linear head.
        """
        _require_linear_head(self, network)
        super().attach(network)
        self.adapts = [name for name in self.adapts if not name.startswith(HEAD)] + [WEIGHT, BIAS]

    def start(self, meta: Weights, tasks: Tasks) -> Weights:
        """The body's meta-weights, and the head of a task's prototypes."""
        body = {name: tasks.expand(meta[name]) for name in self.adapts if not name.startswith(HEAD)}
        return body | head_of_prototypes(self, meta, tasks)


def _require_linear_head(algorithm: Algorithm, network: nn.Module) -> None:
    head = network._modules.get("head")  # noqa: SLF001 - and no attribute of another kind
    if not is_split(network) or not isinstance(head, nn.Linear) or head.bias is None:
        raise ConfigError(
            f"model.algorithm is {type(algorithm).__name__}, which makes the head of a task's samples, but "
            f"{type(network).__name__} is no embedding and head: set model.network to one with a method embed and a "
            "head nn.Linear with a bias, such as dmaml_pl.Conv4."
        )


def head_of_prototypes(algorithm: Algorithm, meta: Weights, tasks: Tasks, fast: Weights | None = None) -> Weights:
    """Weights (T, N, F) and biases (T, N) of each task's linear head.

    The features are of the meta-weights themselves, unless fast ones are given for the body: the head that a task
    starts with is no function of what adapts with it.
    """
    x, y = tasks.batch.support_of(0)
    if not tasks.batch.ways or not isinstance(y, Tensor):
        raise ConfigError(
            f"model.algorithm is {type(algorithm).__name__}, which needs classes, but the tasks have real targets: set "
            "model.algorithm to another, such as dmaml_pl.MAML."
        )
    features = tasks.run(meta, fast or {}, x, "embed")
    members = (y.unsqueeze(-1) == torch.arange(tasks.batch.ways, device=y.device)).to(features.dtype)  # (T, S, N)
    prototypes = members.mT @ features / members.sum(dim=1).unsqueeze(-1)
    return {WEIGHT: 2 * prototypes, BIAS: -prototypes.square().sum(dim=-1)}

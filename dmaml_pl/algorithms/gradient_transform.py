"""What the inner loops have in common that step along a learned linear transform of each weight's gradient."""

from abc import abstractmethod
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.algorithms.learned_step import LearnedStep


class GradientTransform(LearnedStep):
    """The inner loop w' = w - inner_lr * U(dL(support; w)/dw), with a learned U for each weight, at first the identity.

    Its settings are those of `LearnedStep`.

    Examples:
        >>> from dmaml_pl.algorithms import GradientTransform
        >>> class Stretched(GradientTransform):
        ...     def identity(self, weight):
        ...         return {"scale": torch.ones(())}
        ...     def transform(self, own, gradient):
        ...         return own["scale"] * gradient
        ...     def reference(self, package, weight, own):
        ...         raise NotImplementedError
        >>> module = MetaLearning(MLP(hidden=[8]), Stretched(inner_lr=0.01))
        >>> len(list(module.learner.algorithm.parameters()))
        4
    """

    @abstractmethod
    def identity(self, weight: Tensor) -> Weights:
        """The tensors of U for a weight, such that it is the identity; none where its gradient stays as it is."""

    @abstractmethod
    def transform(self, own: Weights, gradient: Tensor) -> Tensor:
        """U of each task's gradient, (T, ...); `own` is what `identity` gave, as it has been learned."""

    @abstractmethod
    def reference(self, package: ModuleType, weight: Tensor, own: Weights) -> nn.Module:
        """learn2learn's U of a weight, which holds the very tensors of `own`."""

    def attach(self, network: nn.Module) -> None:
        """Make U for all that adapts."""
        super().attach(network)
        made = {name: self.identity(weight.detach()) for name, weight in self.adapting(network).items()}
        self.transforms = nn.ModuleList(nn.ParameterDict(tensors) for tensors in made.values())
        self._kinds = {name: list(tensors) for name, tensors in made.items()}

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Every weight w becomes w - inner_lr * U(g)."""
        transformed = dict(gradients)
        for place, (name, kinds) in enumerate(self._kinds.items()):
            if kinds and name in gradients:
                own = {kind: meta[f"{OWN}transforms.{place}.{kind}"] for kind in kinds}
                transformed[name] = self.transform(own, gradients[name])
        return super().step(meta, fast, transformed, number)

    def learn2learn(self, package: ModuleType, network: nn.Module) -> Any:
        """`learn2learn.algorithms.GBML` with these U, where all weights adapt that are not frozen."""
        weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        if self.adapts != list(weights) or self.inner_optimizer is not None:
            return None
        own = {id(weight): self.transforms[place] for place, weight in enumerate(weights.values())}

        def transform_of(weight: Tensor) -> nn.Module | None:
            tensors: Weights = dict(own[id(weight)].named_parameters()) if id(weight) in own else {}
            return self.reference(package, weight, tensors) if tensors else None

        return package.algorithms.GBML(
            network,
            transform_of,
            lr=self.inner_lr,
            first_order=self.first_order,
            allow_nograd=True,
            allow_unused=True,
        )

"""What a meta-optimizer that asks is answered: of the meta-batch under way, by the engine, shared as gradients are."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmaml_pl.engines.base import Engine
from dmaml_pl.learner import MetaLearner
from dmaml_pl.optimizers.problem import Values, flat
from dmaml_pl.tasks import TaskBatch

Share = Callable[[Tensor], Tensor]
"""Makes of this worker's values the mean over the workers, where they make every step together."""


class MetaIteration:
    """A meta-iteration, of which an optimizer asks (`Problem`).

    Args:
        learner: network and algorithm.
        engine: executes them.
        batch: the meta-batch.
        parameters: the optimizer's, in its order.
        share: called with all that is answered, on every worker alike.
    """

    def __init__(
        self, learner: MetaLearner, engine: Engine, batch: TaskBatch, parameters: list[Tensor], share: Share
    ) -> None:
        self._learner = learner
        self._engine = engine
        self._batch = batch
        self._share = share
        names = {id(p): name for name, p in learner.meta().items()}
        self._names = [names[id(p)] for p in parameters]

    def values(self) -> Values:
        """Loss and constraint at the present weights."""
        loss, constraint = self._share(torch.stack(self._engine.evaluate_only(self._learner, self._batch))).tolist()
        return Values(loss, constraint)

    def curvature(self, *, exact: bool, every: int) -> Callable[[list[Tensor]], list[Tensor]]:
        """The curvature of the constraint at the present weights, times a vector."""
        product = self._engine.curvature(self._learner, self._batch, exact=exact, every=every)

        def shared(vector: list[Tensor]) -> list[Tensor]:
            found = product(dict(zip(self._names, vector, strict=True)))
            together = self._share(flat([found[name] for name in self._names]))
            parts = together.split([tensor.numel() for tensor in vector])
            return [part.view_as(tensor) for part, tensor in zip(parts, vector, strict=True)]

        return shared

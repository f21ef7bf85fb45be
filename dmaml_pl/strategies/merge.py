"""Merge rules: how the workers' meta-weights become one at the end of a run.

A rule works on flat vectors and never communicates: the strategy asks each worker for its weight, forms the weighted
mean of all workers' meta-weights in one all-reduce, and hands it to the rule on every worker alike.

Legend: P floating-point parameters of the network, flattened, the same order on every worker. Floating-point buffers
are averaged with the same weights, whatever the rule.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from dmaml_pl.checks import require_at_most, require_counts, require_not_negative
from dmaml_pl.runs import RunReport

MOST_TASKS = 10_000
"""On which every worker evaluates at the end of each run."""


class MergeRule(ABC):
    """Base of the merge rules. A rule with a memory keeps it in its state dict, equal on every worker.

    Attributes:
        acts_alone: whether the rule changes the weights of a single worker, too. Where it does not, a training with one
            worker is bit-identical to one without the strategy.
        validation_tasks: tasks on which every worker evaluates its own weights at the end of its run, before the merge,
            as `report["validation_loss"]`; 0 for none.

    Examples:
        >>> rule: MergeRule = MeanMerge()
        >>> rule.merge(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """

    acts_alone = False
    validation_tasks = 0

    def weight(self, report: RunReport) -> float:
        """How much this worker counts in the mean.

        By default 1, and where runs end after a time, the number of meta-iterations that the worker made in it.
        """
        return report["share"]

    @abstractmethod
    def merge(self, start: Tensor, mean: Tensor) -> Tensor:
        """The new meta-weights (P,), the same on every worker.

        Args:
            start: the meta-weights that every worker started the run from, (P,).
            mean: the weighted mean of the workers' meta-weights at the run's end, (P,).
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of the rule: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - rules without a memory have none to load
        """Take back what `state_dict` gave."""


class MeanMerge(MergeRule):
    """The plain mean of the workers' meta-weights: the DMAML of Soulier's thesis (TH Koeln, 2020).

    It is also local SGD's rule (Stich 2019, arXiv:1805.09767).

    Examples:
        >>> start, mean = torch.zeros(3), torch.ones(3)
        >>> MeanMerge().merge(start, mean)
        tensor([1., 1., 1.])
    """

    def merge(self, start: Tensor, mean: Tensor) -> Tensor:
        """`mean` itself."""
        return mean


class TaskWeightedMerge(MeanMerge):
    """The mean of the workers' meta-weights, weighted by the tasks that each saw in the run (federated averaging).

    w = sum_i n_i w_i / sum_i n_i, with n_i the tasks of worker i (McMahan et al. 2017, arXiv:1602.05629). The plain
    mean where all workers see the same number.

    Examples:
        >>> TaskWeightedMerge().weight({"tasks": 300})
        300.0
    """

    def weight(self, report: RunReport) -> float:
        """The tasks of this worker's run."""
        return float(report["tasks"])


class ValidationWeightedMerge(MeanMerge):
    """The mean of the workers' meta-weights, weighted by how well each does on validation tasks before the merge.

    w = sum_i a_i w_i / sum_i a_i, with a_i = n_i / L_i^power, where L_i is worker i's loss after adaptation on tasks of
    the validation split and n_i is 1, or its meta-iterations where runs end after a time. The idea is that of WASGD
    (Guo et al. 2020, arXiv:2004.03749), which weighs workers by their performance; a power of the loss does not depend
    on its scale, and so needs no exchange before the merge's own.

    Args:
        tasks: number of tasks; all workers evaluate on the same ones, none of which `val/...` is measured on.
        power: how strongly a better worker counts; 0 gives the plain mean.

    Raises:
        ConfigError: `tasks` is not from 1 to 10,000, or `power` is negative.

    Examples:
        >>> rule = ValidationWeightedMerge(tasks=20, power=2.0)
        >>> rule.weight({"share": 1.0, "validation_loss": 0.5})
        4.0
    """

    def __init__(self, tasks: int = 20, power: float = 1.0) -> None:
        name = "trainer.strategy.merge"
        require_counts(**{f"{name}.tasks": tasks})
        require_at_most(MOST_TASKS, **{f"{name}.tasks": tasks})
        require_not_negative(**{f"{name}.power": power})
        self.validation_tasks = tasks
        self.power = power

    def weight(self, report: RunReport) -> float:
        """Share of work over the loss to the power."""
        smallest = 1e-12  # a loss of 0 must not make a weight infinite
        return report["share"] / float(max(report["validation_loss"], smallest) ** self.power)

"""Merge rules: how the workers' meta-weights become one at the end of a run.

A rule works on flat vectors and never communicates: the strategy asks each worker for its weight, forms the weighted
mean of all workers' meta-weights in one all-reduce, and hands it to the rule on every worker alike.

Legend: P floating-point parameters of the network, flattened, the same order on every worker. Floating-point buffers
are averaged with the same weights, whatever the rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from dmaml_pl.runs import RunReport


class MergeRule(ABC):
    """Base of the merge rules. A rule with a memory keeps it in its state dict, equal on every worker.

    Attributes:
        acts_alone: whether the rule changes the weights of a single worker, too. Where it does not, a training with one
            worker is bit-identical to one without the strategy.
    """

    acts_alone = False

    def weight(self, report: RunReport) -> float:
        """How much this worker counts in the mean; 1 by default."""
        return 1.0

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
    """

    def merge(self, start: Tensor, mean: Tensor) -> Tensor:
        """`mean` itself."""
        return mean


class TaskWeightedMerge(MeanMerge):
    """The mean of the workers' meta-weights, weighted by the tasks that each saw in the run (federated averaging).

    w = sum_i n_i w_i / sum_i n_i, with n_i the tasks of worker i (McMahan et al. 2017, arXiv:1602.05629). The plain
    mean where all workers see the same number.
    """

    def weight(self, report: RunReport) -> float:
        """The tasks of this worker's run."""
        return float(report["tasks"])

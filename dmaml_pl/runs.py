"""What a module tells of a run, and what a strategy adds at its end: the contract between the two.

Legend: H meta-iterations of the run, W workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from dmaml_pl.errors import NonFiniteError


class RunReport(TypedDict, total=False):
    """The output of one Lightning training step, which is one run.

    Attributes:
        loss: mean training loss of the run, a scalar.
        series: a figure per meta-iteration, (H,) each, by name; after the merge, the mean over the workers.
        workers: the same figures by worker, (W, H) each; added by the strategy.
        tasks: tasks that this worker's run saw; after the merge, that all workers saw.
        seconds: wall time of the run without the merge; after the merge, the slowest worker's.
        failure: why this worker could not finish its run; the strategy turns it into an error on every worker.
        merge: figures about the merge; added by the strategy.
    """

    loss: Tensor
    series: dict[str, Tensor]
    workers: dict[str, Tensor]
    tasks: int
    seconds: float
    failure: NonFiniteError | None
    merge: dict[str, float]


@runtime_checkable
class RunStrategy(Protocol):
    """A Lightning strategy that knows about runs.

    Attributes:
        run_length: H, or None to leave it to the module.
    """

    run_length: int | None

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Share the gradients in place, if the strategy does; returns the failure of any worker told of here."""
        ...

    def check_workers(self) -> None:
        """Raise an error if a worker is known to be lost; called once a meta-iteration."""
        ...

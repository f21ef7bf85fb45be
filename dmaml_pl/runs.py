"""What a module tells of a run, and what a strategy adds at its end: the contract between the two.

Legend: H meta-iterations of the run, W workers.
"""

import time
from collections.abc import Iterable
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

from dmaml_pl.errors import NonFiniteError

CHECKPOINT_KEY = "dmaml"
"""Where a checkpoint holds what the strategy keeps: the number of workers, each one's moments, its own state."""

IN_MIND = "in_mind"
"""Where a checkpoint of workers that come and go holds what each logger was given, and may not have sent."""

ENV_STEPS, SAMPLING_SECONDS = "env_steps", "sampling_seconds"
"""In `TaskBatch.metrics`: steps in environments that a worker made for a meta-iteration, and how long they took."""


class RunClock:
    """Wall time and computing time of a run, from its making on."""

    def __init__(self) -> None:
        # Threads beside this one belong to the tracking, unless PyTorch computes with several.
        self._cpu = time.thread_time if torch.get_num_threads() == 1 else time.process_time
        self._start, self._cpu_start = time.perf_counter(), self._cpu()

    def seconds(self) -> float:
        """Wall time since the start, in seconds."""
        return time.perf_counter() - self._start

    def cpu_seconds(self) -> float:
        """Time that cores have computed since the start, in seconds; waiting for a core is not in it."""
        return self._cpu() - self._cpu_start


class RunReport(TypedDict, total=False):
    """The output of one Lightning training step, which is one run.

    Attributes:
        loss: mean training loss of the run, a scalar.
        series: a figure per meta-iteration, (H,) each, by name; after the merge, the mean over the workers.
        workers: the same figures by worker, (W, H) each; added by the strategy.
        tasks: tasks that this worker's run saw; after the merge, that all workers saw.
        iterations: meta-iterations that this worker's run made; after the merge, their mean over the workers.
        share: how much this worker did of what it was to do; its meta-iterations, where a run ends after a time.
        seconds: wall time of the run without the merge; after the merge, the slowest worker's.
        cpu_seconds: time that a core computed for the run, which sharing cores does not stretch; after the merge, that
            of the worker that computed longest.
        validation_loss: of this worker's own weights at the end of its run, where the strategy asks for it.
        end: meta-iterations of a worker when the run had ended; where absent, now.
        failure: why this worker could not finish its run; the strategy turns it into an error on every worker.
        merge: figures about the merge; added by the strategy.
    """

    loss: Tensor
    series: dict[str, Tensor]
    workers: dict[str, Tensor]
    tasks: int
    iterations: int
    share: float
    seconds: float
    cpu_seconds: float
    validation_loss: float
    end: int
    failure: NonFiniteError | None
    merge: dict[str, float]


@runtime_checkable
class RunStrategy(Protocol):
    """A Lightning strategy that knows about runs.

    Attributes:
        run_length: H, or None to leave it to the module.
        run_seconds: seconds after which a run ends, whatever its length; None where the length decides.
        validation_tasks: tasks on which every worker evaluates its own weights at the end of a run; 0 for none.
        workers_may_change: whether workers come and go, any of whom may have to go on as worker 0.
    """

    run_length: int | None
    run_seconds: float | None
    validation_tasks: int
    workers_may_change: bool

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], loss: Tensor, failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Share the gradients and the loss that they are of in place, if the strategy does.

        Returns the failure of any worker told of here.
        """
        ...

    def check_workers(self) -> None:
        """Raise an error if a worker is known to be lost; called once a meta-iteration."""
        ...

    def gather(self, own: Any) -> list[Any]:
        """What every worker gave, by worker, on every worker."""
        ...


def strategy_of_runs(trainer: Any) -> RunStrategy | None:
    """The Trainer's strategy, where it knows about runs. Asking takes long: once a run, not at every meta-iteration."""
    strategy = trainer.strategy
    return strategy if isinstance(strategy, RunStrategy) else None

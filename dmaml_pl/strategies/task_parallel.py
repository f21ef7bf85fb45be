"""Parallel tasks: the workers share every meta-iteration's meta-gradient, and so make one training together.

Soulier's thesis (TH Koeln 2020) recommends trying it: the tasks of a meta-batch are dealt to workers, which average
their meta-gradients, as data-parallel training does. W workers with T tasks each take the steps of one worker with W T
tasks. PyTorch's DDP wrapper is not used, as its hooks do not see gradients that `torch.func` computes.

Legend: P floating-point values of the meta-gradient, W workers.
"""

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from dmaml_pl.errors import NonFiniteError
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.exchange import CAUSES, SIGNALS
from dmaml_pl.strategies.flat import FlatState, pack, unpack
from dmaml_pl.strategies.strategy import WorkerStrategy


class TaskParallelStrategy(WorkerStrategy):
    """Averages the workers' meta-gradients at every meta-iteration; all workers hold the same weights throughout.

    A run is what it is elsewhere, H meta-iterations between two chances to validate, so that the two strategies are
    compared by changing one setting. `data.meta_batch` is of each worker, as there. One all-reduce a meta-iteration,
    and one a run for buffers and metrics. Settings are those of `WorkerStrategy`; `on_non_finite: exclude` leaves out a
    worker's meta-gradient.

    Examples:
        >>> TaskParallelStrategy(run_length=20).run_length
        20
    """

    strategy_name = "task_parallel"

    _told_all: NonFiniteError | None = None  # why all are to stop, once they know

    def setup(self, trainer: pl.Trainer) -> None:
        """Lightning's; says how many tasks a meta-gradient is of, as that is what one process is compared by."""
        super().setup(trainer)
        tasks = getattr(getattr(trainer, "datamodule", None), "meta_batch", None)
        if tasks is not None and self.world_size > 1 and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_info(
                f"Each meta-gradient is of {self.world_size * tasks} tasks: data.meta_batch, {tasks}, of each of "
                f"{self.world_size} workers."
            )

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], loss: Tensor, failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Replace the gradients, which every worker has for the same parameters, and the loss by their means.

        An optimizer that decides by the loss what step to make so makes the same one on every worker.

        Returns the failure of the first worker that has one, the same on every worker; None if it was excluded.
        """
        if self.world_size == 1:
            return failure
        failure = super().share_meta_gradient((), loss, failure)
        shared = [*(p.grad for p in parameters if p.grad is not None), loss]
        payload = self.together(lambda: self._sum(shared, failure))
        causes = payload[-self.world_size :].tolist()
        failures = [self._failure(CAUSES[int(cause)], worker) for worker, cause in enumerate(causes) if cause]
        not_finite = [each for each in failures if each.what not in SIGNALS]
        excluded = not_finite if self.on_non_finite == "exclude" else []
        # Also where all are to stop: an optimizer may have asked in the midst of its step, which all end alike.
        unpack(payload[: -self.world_size] / max(self.world_size - len(excluded), 1), shared)
        stop = next((each for each in failures if each.what in SIGNALS), None)
        if stop is None and not_finite and len(excluded) in (0, self.world_size):
            stop = not_finite[0]
        self._told_all = stop
        for left_out in excluded if stop is None else []:
            self._tell_of(left_out)
        return stop

    def _sum(self, shared: list[Tensor], failure: NonFiniteError | None) -> Tensor:
        flags = shared[0].new_zeros(self.world_size)
        own = pack(shared, like=flags)
        if failure is not None:
            flags[self.global_rank] = CAUSES.index(failure.what)
            if self.on_non_finite == "exclude" and failure.what not in SIGNALS:
                own.zero_()
        payload = torch.cat([own, flags])
        torch.distributed.all_reduce(payload)
        return payload

    def _merged_state(self) -> FlatState:
        return FlatState(self._module(), parameters=False)

    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        if self._told_all is not None and report.get("failure") is self._told_all:
            self._stop_together(self._told_all)
        merged = self._exchange(self._offer(state, start, report))
        state.unpack_floats(merged.mean)
        state.unpack_integers(merged.integers)
        return merged.report

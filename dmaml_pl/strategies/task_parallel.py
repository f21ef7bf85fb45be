"""Parallel tasks: the workers share every meta-iteration's meta-gradient, and so make one training together.

Soulier's thesis (TH Koeln 2020) recommends trying it: the tasks of a meta-batch are dealt to workers, which average
their meta-gradients, as data-parallel training does. W workers with T tasks each take the steps of one worker with W T
tasks. PyTorch's DDP wrapper is not used, as its hooks do not see gradients that `torch.func` computes.

Legend: P floating-point values of the meta-gradient, W workers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dmaml_pl.errors import NonFiniteError
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.exchange import Offer
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.group import StartMethod, WorkerFailure
from dmaml_pl.strategies.strategy import NonFinite, WorkerStrategy
from dmaml_pl.strategies.worker_table import CAUSES, SIGNALS


class TaskParallelStrategy(WorkerStrategy):
    """Averages the workers' meta-gradients at every meta-iteration; all workers hold the same weights throughout.

    A run is what it is elsewhere, H meta-iterations between two chances to validate, so that the two strategies are
    compared by changing one setting. One all-reduce a meta-iteration, and one a run for buffers and metrics.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        timeout: seconds that a worker waits for the others at a meta-iteration before it gives up.
        on_worker_failure: whether the training is to "stop" or to "continue" with the others when a worker other than
            worker 0 is lost. To continue, dmaml itself must start the workers, on one machine.
        on_non_finite: whether all "stop" when a worker's loss is not finite, or "exclude" its meta-gradient.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how Lightning starts workers on this machine: "popen" runs the same command again, "spawn" and
            "fork" also work in a notebook.

    Raises:
        ConfigError: a setting out of its range.
    """

    strategy_name = "task_parallel"

    def __init__(
        self,
        run_length: int | None = None,
        timeout: float = 600.0,
        on_worker_failure: WorkerFailure = "stop",
        on_non_finite: NonFinite = "stop",
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            run_length, None, timeout, on_worker_failure, on_non_finite, process_group_backend, start_method
        )

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Replace the gradients by their mean over the workers.

        Args:
            parameters: what is meta-learned; every worker has gradients for the same ones.
            failure: why this worker has no finite meta-gradient, if so.

        Returns:
            The failure of the first worker that has one, the same on every worker; None if it was excluded.
        """
        if self.world_size == 1:
            return failure
        failure = super().share_meta_gradient((), failure)
        gradients = [p.grad for p in parameters if p.grad is not None]
        payload = self.together(lambda: self._sum(gradients, failure))
        causes = [int(cause) for cause in payload[-self.world_size :].tolist()]
        failures = [
            NonFiniteError(CAUSES[cause - 1], worker=worker, run=self._run(), iteration=self._iteration())
            for worker, cause in enumerate(causes)
            if cause
        ]
        for stop in failures:
            if stop.what in SIGNALS:
                return stop
        if failures and (self.on_non_finite == "stop" or len(failures) == self.world_size):
            return failures[0]
        for left_out in failures:
            self._tell_of(left_out)
        mean = payload[: -self.world_size] / (self.world_size - len(failures))
        for gradient, values in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))
        return None

    def _sum(self, gradients: list[Tensor], failure: NonFiniteError | None) -> Tensor:
        flags = gradients[0].new_zeros(self.world_size)
        own = [gradient.reshape(-1).to(flags.dtype) for gradient in gradients]
        if failure is not None:
            flags[self.global_rank] = 1 + CAUSES.index(failure.what)
            if self.on_non_finite == "exclude":
                own = [torch.zeros_like(gradient) for gradient in own]
        payload = torch.cat([*own, flags])
        torch.distributed.all_reduce(payload)
        return payload

    def _merged_state(self) -> FlatState:
        return FlatState(self._module(), parameters=False)

    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        own = state.pack_floats()
        squared_displacement = float((own - start).double().square().sum())
        merged = self._exchange(Offer(own, start, squared_displacement, state.pack_integers(), report, weight=1.0))
        state.unpack_floats(merged.mean)
        state.unpack_integers(merged.integers)
        return merged.report

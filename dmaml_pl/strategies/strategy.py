"""What strategies with workers share: runs that end in one all-reduce, and checkpoints of what every worker needs.

Workers start from identical weights and buffers. A worker whose loss or weights are no longer finite tells the others
in an all-reduce that they make anyway, and all stop with the same error, or leave it out. What happens when a worker is
lost stands in `group.py`.

Legend: W workers, P floating-point values that are merged, H meta-iterations of a run.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, cast

import torch
from lightning_fabric.utilities.types import _PATH
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from dmaml_pl.checks import require_counts, require_one_of
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.runs import CHECKPOINT_KEY, RunReport
from dmaml_pl.strategies.exchange import SIGNALS, Exchange, Merged, Offer, Sent
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.group import WorkerGroupStrategy

NonFinite = Literal["stop", "exclude"]


class WorkerStrategy(WorkerGroupStrategy):
    """Base of the strategies: workers make runs, and end each together.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        on_non_finite: whether all "stop" when a worker's loss or weights are not finite, or the merge is to "exclude"
            that worker, which then goes on from the others' weights.
        group: settings of `WorkerGroupStrategy`.

    Attributes:
        run_seconds: seconds after which every worker ends its run, where these decide instead of a length.
        validation_tasks: tasks on which every worker evaluates its own weights at the end of a run.

    Raises:
        ConfigError: a setting out of its range.

    Examples:
        >>> DMAMLStrategy(run_length=50, on_non_finite="exclude").run_length
        50
    """

    strategy_name = "workers"
    run_seconds: float | None = None
    validation_tasks = 0

    def __init__(self, run_length: int | None = None, on_non_finite: NonFinite = "stop", **group: Any) -> None:
        if run_length is not None:
            require_counts(**{"trainer.strategy.run_length": run_length})
        require_one_of("trainer.strategy.on_non_finite", on_non_finite, ("stop", "exclude"))
        super().__init__(**group)
        self.run_length = run_length
        self.on_non_finite = on_non_finite
        self.exchange = Exchange(exclude=on_non_finite == "exclude")
        self._steps_before = 0

    def check(self, trainer: Any, module: Any, data: Any) -> None:
        """Refuse before the training, in this process, what cannot be trained so.

        Raises:
            ConfigError: names the setting.
        """
        device, given = self.root_device.type, self._process_group_backend
        able = [
            name
            for name, devices in torch.distributed.Backend.backend_capability.items()
            if device in devices and torch.distributed.is_backend_available(name)
        ]
        if given is not None and not any(part.rpartition(":")[2] in able for part in given.split(",")):
            raise ConfigError(
                f"trainer.strategy.process_group_backend is {given}, but must be {' or '.join(able)} for workers on "
                f"{device}."
            )

    def configure_ddp(self) -> None:
        """Nothing to wrap; worker 0's weights and buffers become everyone's.

        Raises:
            ConfigError: the module does not train in runs.
        """
        module = self._module()
        if module.automatic_optimization:
            raise ConfigError(
                f"trainer.strategy is {self.strategy_name}, but {type(module).__name__} does not train in runs: use a "
                "model of dmaml_pl, such as dmaml_pl.MetaLearning."
            )
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.detach(), src=0)

    # -- a run -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a run, then end it together with the other workers.

        Raises:
            NonFiniteError: a worker's loss or weights are no longer finite; the same error on every worker.
            WorkerLostError: a worker has died or did not come in time.
        """
        module = self._module()
        self._run = module.runs_done
        if self._alone and not self._acts_alone():
            return super().training_step(*args, **kwargs)
        state = self._merged_state()
        start, self._steps_before = state.pack_floats(), module.trainer.global_step
        self._in_run = True
        report = cast("RunReport", super().training_step(*args, **kwargs))
        began = time.perf_counter()
        merged = self._end_of_run(state, start, report)
        self._in_run = False
        if self.world_size > 1:
            merged.setdefault("merge", {})["merge/seconds"] = time.perf_counter() - began
        return merged

    @property
    def _alone(self) -> bool:
        """Whether there is nobody to merge with."""
        return self.world_size == 1

    def _acts_alone(self) -> bool:
        """Whether there is something to do at the end of a single worker's run."""
        return False

    @abstractmethod
    def _merged_state(self) -> FlatState:
        """What of the module is merged at the end of a run."""

    @abstractmethod
    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        """Make the workers' runs one; `start` is the state before the run."""

    def _offer(
        self, state: FlatState, start: Tensor, report: RunReport, weight: float = 1.0, moments: Tensor | None = None
    ) -> Offer:
        own, moments = state.pack_floats(), state.like if moments is None else moments
        return Offer(
            values=torch.cat([own, moments]),
            base=torch.cat([start, torch.zeros_like(moments)]),
            squared_displacement=float((own - start).double().square().sum()),
            integers=state.pack_integers(),
            report=report,
            weight=weight,
            run=self._run,
            steps=self._steps_before,
            parameters=state.parameter_size,
        )

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], loss: Tensor, failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Called between each meta-gradient and its step; a strategy of runs shares nothing there.

        A signal that this worker has heard ends its run, whose end tells the others: all stop together.
        """
        if failure is None and self.world_size > 1 and self._asked_to_stop is not None:
            what = next(name for name, kind in SIGNALS.items() if isinstance(self._asked_to_stop, kind))
            return self._failure(what, self.global_rank)
        return failure

    def _failure(self, what: str, worker: int) -> NonFiniteError:
        """What ends a run in the meta-iteration under way."""
        return NonFiniteError(what, worker=worker, run=self._run, iteration=self._module().under_way.iteration)

    def _stop_together(self, failure: NonFiniteError) -> NoReturn:
        """End the training for what all workers have been told alike, which may be a signal that one has heard."""
        self.stopped_together = True
        if failure.what in SIGNALS:
            raise self._asked_to_stop or SIGNALS[failure.what]() from None
        raise failure

    def _accept(self, sent: Sent) -> Merged:
        """Read what came of an exchange, and count what the others did."""
        try:
            merged = self.exchange.read(sent)
        except NonFiniteError as told:
            self._stop_together(told)
        for failure in merged.failures:
            self._tell_of(failure)
        self._module().tasks_seen += merged.report["tasks"] - sent.offer.report["tasks"]
        if self.run_seconds is not None or merged.failures:
            self._count_alike(sent.offer.steps + merged.report["iterations"])
        return merged

    def _exchange(self, offer: Offer) -> Merged:
        """One all-reduce; everything that follows it is the same arithmetic on every worker."""
        return self._accept(self.together(lambda: self.exchange.wait(self._send(offer))))

    def _send(self, offer: Offer) -> Sent:
        return self.exchange.send(offer, self.global_rank, self.world_size)

    def _tell_of(self, excluded: NonFiniteError) -> None:
        rank_zero_info(
            f"{excluded.what} of worker {excluded.worker} is not finite in run {excluded.run}, meta-iteration "
            f"{excluded.iteration}: it is left out, and the training goes on."
        )

    def _count_alike(self, steps: int) -> None:
        """Let Lightning count the same number of meta-iterations on all workers, so that all end at the same run."""
        trainer = self._module().trainer
        more, progress = steps - trainer.global_step, trainer.fit_loop.epoch_loop.manual_optimization
        for tracker in (progress.optim_step_progress.total, progress.optim_step_progress.current):
            tracker.ready += more
            tracker.completed += more

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one file that holds what every worker needs: the merged weights, and each worker's own moments."""
        workers = {"workers": self.world_size} | self._moments_to_keep(checkpoint)
        checkpoint[CHECKPOINT_KEY] = workers | checkpoint.get(CHECKPOINT_KEY, self.state_to_keep())
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def _moments_to_keep(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        if self.world_size == 1:
            return {}
        own = apply_to_collection(checkpoint.get("optimizer_states", []), Tensor, Tensor.cpu)

        def gather() -> list[Any] | None:
            everyone = [None] * self.world_size if self.global_rank == 0 else None
            torch.distributed.gather_object(own, everyone)
            return everyone

        return {"optimizer_states": self.together(gather)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give this worker its own moments back, and the strategy its memory."""
        self._load_kept_state(checkpoint.get(CHECKPOINT_KEY, {}))
        super().load_optimizer_state_dict(self._with_own_moments(checkpoint))

    def _with_own_moments(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """This worker's own; with another number of workers than those who kept them, everyone takes worker 0's."""
        everyone = checkpoint.get(CHECKPOINT_KEY, {}).get("optimizer_states", [checkpoint["optimizer_states"]])
        if len(everyone) == self.world_size:
            return {**checkpoint, "optimizer_states": everyone[self.global_rank]}
        rank_zero_info(
            f"The checkpoint has the optimizer moments of {len(everyone)} worker(s), and there are {self.world_size} "
            "now: training goes on from the merged weights, every worker with those of worker 0."
        )
        return checkpoint

    def try_restoring(self, kept: Mapping[str, Any]) -> None:
        """Take back what a checkpoint has of the strategy, before the training does; raises whatever stands in the way.

        Args:
            kept: what `save_checkpoint` has written.
        """
        if kept and int(kept["workers"]) < 1:
            raise ValueError(f"workers is {kept['workers']}")
        self._load_kept_state(kept)

    def state_to_keep(self) -> dict[str, Any]:
        """What a strategy keeps of itself in a checkpoint: tensors and plain values."""
        return {}

    def _load_kept_state(self, kept: Mapping[str, Any]) -> None:
        """Take back what `state_to_keep` gave."""

"""What strategies with workers share: starting them, noticing their end, and one all-reduce at the end of a run.

Workers start from identical weights and buffers. A worker whose loss or weights are no longer finite tells the others
in an all-reduce that they make anyway, and all stop with the same error, or leave it out. A worker that has died, or
that does not come within `timeout` seconds, ends the training on every other, or is left behind.

Legend: W workers, P floating-point values that are merged, H meta-iterations of a run.
"""

from __future__ import annotations

import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric.utilities.distributed import _init_dist_connection
from lightning_fabric.utilities.types import _PATH
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from dmaml_pl import restarts
from dmaml_pl.errors import ConfigError, NonFiniteError, WorkerLostError, require_positive
from dmaml_pl.runs import CHECKPOINT_KEY, RunReport
from dmaml_pl.strategies.exchange import Exchange, Merged, Offer, Place, Sent
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.launcher import POLL_SECONDS, WorkerLauncher, started_by_us
from dmaml_pl.strategies.membership import Membership

WorkerFailure = Literal["stop", "continue"]
NonFinite = Literal["stop", "exclude"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

T = TypeVar("T")


class WorkerStrategy(DDPStrategy):
    """Base of the strategies: of Lightning's DDP it takes the launching and the process group, not the wrapper.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        run_seconds: seconds after which every worker ends its run, instead of a length.
        timeout: seconds that a worker waits for the others before it gives up.
        on_worker_failure: whether the others "stop" or "continue" when a worker is lost.
        on_non_finite: whether all "stop" when a worker's loss or weights are not finite, or the merge "exclude"s it.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how Lightning starts workers on this machine.

    Attributes:
        validation_tasks: tasks on which every worker judges its own weights at the end of a run.

    Raises:
        ConfigError: a setting out of its range.
    """

    strategy_name = "workers"
    validation_tasks = 0

    def __init__(
        self,
        run_length: int | None,
        run_seconds: float | None,
        timeout: float,
        on_worker_failure: WorkerFailure,
        on_non_finite: NonFinite,
        process_group_backend: str | None,
        start_method: StartMethod,
    ) -> None:
        if run_length is not None:
            require_positive(**{"trainer.strategy.run_length": run_length})
        if run_seconds is not None:
            require_positive(**{"trainer.strategy.run_seconds": run_seconds})
            if run_length is not None:
                raise ConfigError(
                    f"trainer.strategy.run_length is {run_length} and trainer.strategy.run_seconds is {run_seconds}: "
                    "a run ends after a number of meta-iterations or after a time, so set one of them to null."
                )
        require_positive(**{"trainer.strategy.timeout": timeout})
        require_one_of("on_worker_failure", on_worker_failure, ("stop", "continue"))
        require_one_of("on_non_finite", on_non_finite, ("stop", "exclude"))
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout), start_method=start_method
        )
        self.run_length = run_length
        self.run_seconds = run_seconds
        self.on_worker_failure = on_worker_failure
        self.on_non_finite = on_non_finite
        self.exchange = Exchange(even=run_seconds is None, exclude=on_non_finite == "exclude")
        self.membership: Membership | None = None
        self._merging = False
        self._terminated = False
        self._steps_before = 0
        self._reshare_validation = False

    def configure_ddp(self) -> None:
        """Nothing to wrap; worker 0's weights and buffers become everyone's.

        Raises:
            ConfigError: the module does not train in runs.
        """
        module = self._module()
        if module.automatic_optimization:
            raise ConfigError(
                f"trainer.strategy is {self.strategy_name}, but {type(module).__name__} does not train in runs: use a "
                "model of dmaml_pl, such as dmaml_pl.MAML."
            )
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.detach(), src=0)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "Lightning sets it first"  # noqa: S101
        ours = started_by_us() or not self.cluster_environment.creates_processes_externally
        if self.on_worker_failure == "continue" and not (
            ours and self._start_method == "popen" and self.num_nodes == 1
        ):
            raise ConfigError(
                "trainer.strategy.on_worker_failure is continue, for which dmaml itself must start all workers, on one "
                "machine (--trainer.devices W): with torchrun, SLURM or several machines set it to stop, and let the "
                "launcher restart the training (torchrun --max-restarts)."
            )
        if self._start_method == "popen":
            self._launcher = WorkerLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Meet the other workers, all of whom must have come this far.

        Raises:
            WorkerLostError: one has ended before.
        """
        launcher = self._launcher
        if isinstance(launcher, WorkerLauncher) and self.membership is None:
            launcher.await_workers(self.check_workers)
        super().setup_environment()
        if self.on_worker_failure == "continue" and self.world_size > 1 and self.membership is None:
            assert isinstance(launcher, WorkerLauncher)  # noqa: S101 (_configure_launcher saw to it)
            self.membership = Membership(
                me=self.global_rank,
                workers=self.world_size,
                backend=torch.distributed.get_backend(),
                timeout=self._timeout_seconds(),
                is_alive=launcher.is_alive,
                end=launcher.end_worker,
                check=self.check_workers,
            )

    def set_world_ranks(self) -> None:
        """Lightning's; after a worker was lost, the ranks of those who are left."""
        super().set_world_ranks()
        if self.membership is not None and self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.membership.rank)
            self.cluster_environment.set_world_size(self.membership.size)
            rank_zero_only.rank = self.membership.rank  # type: ignore[attr-defined]

    def setup_distributed(self) -> None:
        """Lightning's; where torchrun may have made an attempt before, apart from what that has left behind."""
        store = restarts.agent_store()
        if store is not None and not torch.distributed.is_initialized():
            self.set_world_ranks()
            fresh = restarts.fresh_store(
                store,
                rank=self.global_rank,
                workers=self.world_size,
                timeout=max(self._timeout_seconds(), restarts.START_SECONDS),
                check=self.check_workers,
            )
            device = None if self.root_device.type == "cpu" else self.root_device
            assert self.cluster_environment is not None, "Lightning sets it first"  # noqa: S101
            _init_dist_connection(
                self.cluster_environment,
                self._get_process_group_backend(),
                store=fresh,
                timeout=self._timeout,
                device_id=device,
            )
        super().setup_distributed()

    def check_workers(self) -> None:
        """Cheap enough for every meta-iteration: no communication, only what the launcher has noticed.

        Raises:
            WorkerLostError: a worker that this process started has ended, and the others are not to continue.
            SIGTERMException: this process was asked to end.
        """
        if self._terminated:
            raise SIGTERMException
        if isinstance(self._launcher, WorkerLauncher) and self._launcher.lost and self.membership is None:
            raise WorkerLostError(
                f"{self._launcher.lost[0]} while run {self._run()} was under way. Training has stopped on every worker;"
                " the last checkpoint, if there was one yet, is kept, and --ckpt_path last goes on from it."
            )

    def on_train_start(self) -> None:
        """Answer SIGTERM (pre-emption) within a meta-iteration, on every worker of this machine.

        Lightning's own handler makes a collective call inside the signal handler, which deadlocks with a merge.
        """
        super().on_train_start()
        self._answer_sigterm(self._end_run)

    def on_test_start(self) -> None:
        """Answer SIGTERM at once: a test has nothing to lose."""
        super().on_test_start()
        self._answer_sigterm(self._end_now)

    def on_predict_start(self) -> None:
        """As for a test."""
        super().on_predict_start()
        self._answer_sigterm(self._end_now)

    def _answer_sigterm(self, handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)

    def _end_run(self, number: int, frame: Any) -> None:
        self._terminated = True
        if isinstance(self._launcher, WorkerLauncher):
            self._launcher.kill(signal.SIGTERM)

    def _end_now(self, number: int, frame: Any) -> None:
        self._end_run(number, frame)
        raise SIGTERMException

    def on_exception(self, exception: BaseException) -> None:
        """End the other workers too; they may be waiting for this one."""
        super().on_exception(exception)
        if isinstance(self._launcher, WorkerLauncher) and not isinstance(exception, NonFiniteError):
            self._launcher.look()  # before they are all ended from here
            self._launcher.stop_workers()

    # -- calls that all workers make together ----------------------------------------------------------------------

    def together(self, call: Callable[[], T]) -> T:
        """Make a collective call; where workers may be lost, again with those who are left, until all have made it.

        Raises:
            WorkerLostError: a worker has died or did not come in time.
        """
        if self.membership is None:
            return self._call_once(call)
        while True:
            result: T
            try:
                result = call()
                succeeded = True
            except RuntimeError:
                succeeded = False
            before = self.membership.members
            if self.membership.agree(succeeded):
                return result
            self.membership.regroup()
            self._close_ranks(before)

    def _call_once(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            self.await_verdict()
            raise WorkerLostError(
                f"worker {self.global_rank} lost contact with another worker in run {self._run()}: it has died, "
                f"or did not come within trainer.strategy.timeout ({self._timeout_seconds():g} s). Training has "
                "stopped; the last checkpoint is kept. The lost worker's own message, if any, stands above."
            ) from error

    def _close_ranks(self, before: list[int]) -> None:
        members = cast("Membership", self.membership).members
        self.set_world_ranks()
        self._reshare_validation = True
        if isinstance(self._launcher, WorkerLauncher):
            self._launcher.look()
            lost = "; ".join(self._launcher.lost) or f"worker {sorted(set(before) - set(members))} was lost"
            rank_zero_info(
                f"{lost}, in run {self._run()}: training goes on with {len(members)} "
                f"worker{'s' if len(members) > 1 else ''}."
            )
            self._launcher.lost.clear()

    def gather(self, own: Any) -> list[Any]:
        """What every worker gave, by worker, on every worker."""

        def call() -> list[Any]:
            everyone: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyone, own)
            return everyone

        return [own] if self.world_size == 1 else self.together(call)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, among those who are left."""
        self.together(lambda: super(WorkerStrategy, self).barrier(*args, **kwargs))

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Lightning's, among those who are left."""
        return self.together(lambda: super(WorkerStrategy, self).broadcast(obj, src))

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Lightning's, among those who are left."""
        own = tensor.clone() if isinstance(tensor, Tensor) else tensor

        def call() -> Any:
            again = own.clone() if isinstance(own, Tensor) else own
            return super(WorkerStrategy, self).reduce(again, group, reduce_op)

        return self.together(call)

    # -- a run -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a run, then end it together with the other workers.

        Raises:
            NonFiniteError: a worker's loss or weights are no longer finite; the same error on every worker.
            WorkerLostError: a worker has died or did not come in time.
        """
        self._share_validation_anew()
        if self.world_size == 1 and not self._acts_alone():
            return super().training_step(*args, **kwargs)
        state = self._merged_state()
        start = state.pack_floats()
        self._steps_before = self._module().trainer.global_step
        report = cast("RunReport", super().training_step(*args, **kwargs))
        began = time.perf_counter()
        self._merging = True
        merged = self._end_of_run(state, start, report)
        self._merging = False
        if self.world_size > 1:
            merged.setdefault("merge", {})["merge/seconds"] = time.perf_counter() - began
        return merged

    def _acts_alone(self) -> bool:
        """Whether there is something to do at the end of a single worker's run."""
        return False

    @abstractmethod
    def _merged_state(self) -> FlatState:
        """What of the module is merged at the end of a run."""

    @abstractmethod
    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        """Make the workers' runs one; `start` is the state before the run."""

    def share_meta_gradient(
        self, parameters: Iterable[nn.Parameter], failure: NonFiniteError | None
    ) -> NonFiniteError | None:
        """Called between each meta-gradient and its step; a strategy of runs shares nothing there."""
        return failure

    def _exchange(self, offer: Offer) -> Merged:
        """One all-reduce; everything that follows it is the same arithmetic on every worker.

        Raises:
            NonFiniteError: of the first worker that could not finish its run, where it is not to be excluded.
            WorkerLostError: a worker has died or did not come in time.
        """
        return self._accept(self.together(lambda: self.exchange.wait(self.exchange.send(offer, self._place()))))

    def _place(self) -> Place:
        return Place(self.global_rank, self.world_size, self._run(), self._steps_before)

    def _accept(self, sent: Sent) -> Merged:
        """Read what came of an exchange, and count what the others did.

        Raises:
            NonFiniteError: of the first worker that could not finish its run, where it is not to be excluded.
        """
        merged = self.exchange.read(sent)
        for failure in merged.failures:
            self._tell_of(failure)
        if self.membership is not None:
            merged.report["merge"]["merge/workers"] = float(self.world_size)
        self._module().tasks_seen += merged.report["tasks"] - sent.offer.report["tasks"]
        if self.run_seconds is not None or merged.failures:
            self._count_alike(sent.place.steps + merged.report["iterations"])
        return merged

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

    def await_verdict(self) -> None:
        """A broken connection is noticed before the launcher has seen who died; it tells more.

        Raises:
            WorkerLostError: the launcher knows which worker has ended.
            SIGTERMException: this process was asked to end.
        """
        deadline = time.monotonic() + 4 * POLL_SECONDS
        while time.monotonic() < deadline:
            self.check_workers()
            time.sleep(POLL_SECONDS / 5)

    def _share_validation_anew(self) -> None:
        """After a worker was lost, let those who are left share all validation tasks."""
        if self._reshare_validation:
            self._reshare_validation = False
            self._module().trainer.fit_loop.epoch_loop.val_loop._combined_loader = None  # noqa: SLF001 - or it is kept

    def _run(self) -> int:
        """Number of the run under way; the module counts it as done when the merge begins."""
        return int(getattr(self.lightning_module, "runs_done", 0)) - self._merging

    def _timeout_seconds(self) -> float:
        return 0.0 if self._timeout is None else self._timeout.total_seconds()

    def _module(self) -> Any:
        assert self.lightning_module is not None, "Lightning connects the module before it uses the strategy"  # noqa: S101
        return self.lightning_module

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one file that holds what every worker needs: the merged weights, and each worker's own moments."""
        kept: dict[str, Any] = {"workers": self.world_size}
        if self.world_size > 1:
            own = apply_to_collection(checkpoint.get("optimizer_states", []), Tensor, Tensor.cpu)

            def call() -> list[Any] | None:
                everyone: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
                torch.distributed.gather_object(own, everyone)
                return everyone

            everyone = self.together(call)
            kept = {"workers": self.world_size, "optimizer_states": everyone}
        checkpoint[CHECKPOINT_KEY] = kept | self._own_state()
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give this worker its own moments back; with another number of workers, everyone takes worker 0's."""
        kept = checkpoint.get(CHECKPOINT_KEY, {"workers": 1})
        if kept["workers"] != self.world_size:
            rank_zero_info(
                f"The checkpoint was made by {kept['workers']} worker(s), and there are {self.world_size} now: training"
                " goes on from the merged weights, every worker with the optimizer moments of worker 0."
            )
        elif self.world_size > 1:
            checkpoint = {**checkpoint, "optimizer_states": kept["optimizer_states"][self.global_rank]}
        self._load_own_state(kept)
        super().load_optimizer_state_dict(checkpoint)

    def _own_state(self) -> dict[str, Any]:
        """What a strategy keeps of itself in a checkpoint: tensors and plain values."""
        return {}

    def _load_own_state(self, kept: Mapping[str, Any]) -> None:
        """Take back what `_own_state` gave."""


def require_one_of(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a setting of the strategy is one of its choices.

    Raises:
        ConfigError: names the setting and the choices.
    """
    if value not in choices:
        raise ConfigError(f"trainer.strategy.{setting} is {value}, but must be {' or '.join(choices)}.")

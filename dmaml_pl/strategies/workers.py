"""What strategies with workers share: starting them, noticing their end, and one all-reduce at the end of a run.

Workers start from identical weights and buffers. A worker whose loss or weights are no longer finite tells the others
in an all-reduce that they make anyway, and all stop with the same error. A worker that has died, or that does not come
within `timeout` seconds, ends the training on every other.

Legend: W workers, P floating-point values that are merged, M series, H meta-iterations of a run.
"""

from __future__ import annotations

import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from dmaml_pl.errors import ConfigError, NonFiniteError, WorkerLostError, require_positive
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.launcher import POLL_SECONDS, WorkerLauncher
from dmaml_pl.strategies.payload import WorkerTable, pack_row, unpack_table

CHECKPOINT_KEY = "dmaml"


class WorkerStrategy(DDPStrategy):
    """Base of the strategies: of Lightning's DDP it takes the launching and the process group, not the wrapper.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        timeout: seconds that a worker waits for the others before it gives up.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how Lightning starts workers on this machine.

    Raises:
        ConfigError: a setting out of its range.
    """

    strategy_name = "workers"

    def __init__(
        self,
        run_length: int | None,
        timeout: float,
        process_group_backend: str | None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
    ) -> None:
        if run_length is not None:
            require_positive(**{"trainer.strategy.run_length": run_length})
        require_positive(**{"trainer.strategy.timeout": timeout})
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout), start_method=start_method
        )
        self.run_length = run_length
        self._merging = False
        self._terminated = False

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
        if self._start_method == "popen":
            assert self.cluster_environment is not None, "Lightning sets it first"  # noqa: S101
            self._launcher = WorkerLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Meet the other workers, all of whom must have come this far.

        Raises:
            WorkerLostError: one has ended before.
        """
        if isinstance(self._launcher, WorkerLauncher):
            self._launcher.await_workers(self.check_workers)
        super().setup_environment()

    def check_workers(self) -> None:
        """Cheap enough for every meta-iteration: no communication, only what the launcher has noticed.

        Raises:
            WorkerLostError: a worker that this process started has ended.
            SIGTERMException: this process was asked to end.
        """
        if self._terminated:
            raise SIGTERMException
        if isinstance(self._launcher, WorkerLauncher) and self._launcher.lost is not None:
            raise WorkerLostError(
                f"{self._launcher.lost} while run {self._run()} was under way. Training has stopped on every worker; "
                "the last checkpoint, if there was one yet, is kept, and --ckpt_path last goes on from it."
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

    # -- a run -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a run, then end it together with the other workers.

        Raises:
            NonFiniteError: a worker's loss or weights are no longer finite; the same error on every worker.
            WorkerLostError: a worker has died or did not come in time.
        """
        if self.world_size == 1 and not self._acts_alone():
            return super().training_step(*args, **kwargs)
        state = self._merged_state()
        start = state.pack_floats()
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

    def _exchange(
        self, state: FlatState, start: Tensor, report: RunReport, weight: float
    ) -> tuple[Tensor, Tensor, WorkerTable]:
        """One all-reduce; everything that follows it is the same arithmetic on every worker.

        Returns:
            The weighted mean of the workers' floating-point state (P,), worker 0's integers, and the table of all
            workers, which is also worked into the report.

        Raises:
            NonFiniteError: of the first worker that could not finish its run.
        """
        series = torch.stack(list(report["series"].values()))
        failure = report.get("failure")
        own = state.pack_floats()
        integers = state.pack_integers()
        row = pack_row(
            worker=self.global_rank,
            workers=self.world_size,
            figures=(
                weight,
                float((own - start).double().square().sum()),
                float(report["tasks"]),
                report["seconds"],
            ),
            failure=failure if failure is not None and failure.worker == self.global_rank else None,
            series=series,
            like=own,
        )
        payload = torch.cat([own * weight, integers if self.global_rank == 0 else torch.zeros_like(integers), row])
        self._all_reduce(payload)
        floats, integers, rows = payload.split([own.numel(), integers.numel(), row.numel()])
        table = unpack_table(rows, workers=self.world_size, run=self._run(), shape=(series.shape[0], series.shape[1]))
        if table.failures:
            raise table.failures[0]
        _add_table(report, table)
        report["merge"] = {"merge/bytes": float(payload.numel() * payload.element_size())}
        return floats / table.weight.sum(), integers, table

    def _all_reduce(self, payload: Tensor) -> None:
        try:
            torch.distributed.all_reduce(payload)
        except RuntimeError as error:
            self.await_verdict()
            raise WorkerLostError(
                f"worker {self.global_rank} lost contact with another worker in run {self._run()}: it has died, "
                f"or did not come within trainer.strategy.timeout ({self._timeout_seconds():g} s). Training has "
                "stopped; the last checkpoint is kept. The lost worker's own message, if any, stands above."
            ) from error

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
            own = _to_cpu(checkpoint.get("optimizer_states", []))
            everyone: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
            torch.distributed.gather_object(own, everyone)
            kept["optimizer_states"] = everyone
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


def _add_table(report: RunReport, table: WorkerTable) -> None:
    """Make a worker's report the report of all workers."""
    by_worker = table.series.cpu()
    report["workers"] = {name: by_worker[:, number] for number, name in enumerate(report["series"])}
    report["series"] = {name: values.mean(dim=0) for name, values in report["workers"].items()}
    report["loss"] = report["series"]["loss"].mean()
    report["tasks"] = int(table.tasks.sum())
    report["seconds"] = float(table.seconds.max())


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value

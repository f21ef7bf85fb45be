"""The DMAML strategy: workers make runs alone, and merge their meta-weights at the end of each.

Soulier, "Distributed Model-Agnostic Meta-Learning", master thesis, TH Koeln 2020. The scheme is that of local SGD
(Stich 2019, arXiv:1805.09767) with a meta-learner as the local optimizer.

What it promises: workers start from identical weights and buffers; no worker waits for another within a run; at the
run's end there is one all-reduce, after which all workers hold bit-identical weights and buffers; with one worker
and the plain mean nothing is done at all. A worker whose loss or weights are no longer finite tells the others in that same all-reduce,
and all stop with the same error. A worker that has died, or that does not come within `timeout` seconds, ends the
training on every other.

Legend: W workers, P floating-point values of the network, M series, H meta-iterations of a run.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from dmaml_pl.errors import ConfigError, NonFiniteError, WorkerLostError, require_positive
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.launcher import POLL_SECONDS, WorkerLauncher
from dmaml_pl.strategies.merge import MeanMerge, MergeRule
from dmaml_pl.strategies.payload import WorkerTable, pack_row, unpack_table

CHECKPOINT_KEY = "dmaml"


class DMAMLStrategy(DDPStrategy):
    """Lets W workers train alone for a run of H meta-iterations, then merges their meta-weights, and so on.

    Of Lightning's DDP it takes the launching of processes and the process group; the wrapper that averages gradients
    is not used. The workers' own optimizer moments are kept over a merge.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        merge: how the workers' weights become one; the plain mean of the thesis by default.
        timeout: seconds that a worker waits for the others at a merge before it gives up. Must exceed the time by
            which the slowest worker's run is longer than the fastest's, and the start-up of all workers.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how Lightning starts workers on this machine: "popen" runs the same command again, "spawn" and
            "fork" also work in a notebook.

    Raises:
        ConfigError: a setting out of its range.
    """

    strategy_name = "dmaml"

    def __init__(
        self,
        run_length: int | None = None,
        merge: MergeRule | None = None,
        timeout: float = 600.0,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if run_length is not None:
            require_positive(**{"trainer.strategy.run_length": run_length})
        require_positive(**{"trainer.strategy.timeout": timeout})
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout), start_method=start_method
        )
        self.run_length = run_length
        self.merge_rule = MeanMerge() if merge is None else merge
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
                f"trainer.strategy is dmaml, but {type(module).__name__} does not train in runs: use a model of "
                "dmaml_pl, such as dmaml_pl.MAML."
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
            self._launcher.stop_workers()

    # -- a run -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a run alone, then merge it with the others'.

        Raises:
            NonFiniteError: a worker's loss or weights are no longer finite; the same error on every worker.
            WorkerLostError: a worker has died or did not come in time.
        """
        if self.world_size == 1 and not self.merge_rule.acts_alone:
            return super().training_step(*args, **kwargs)
        state = FlatState(self._module())
        start = state.pack_floats()
        report = cast("RunReport", super().training_step(*args, **kwargs))
        if self.world_size == 1:
            state.unpack_floats(self._apply_rule(start, state.pack_floats(), state.parameter_size))
            return report
        return self._merge(state, start, report)

    def _merge(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        """One all-reduce; everything that follows it is the same arithmetic on every worker."""
        began = time.perf_counter()
        self._merging = True
        failure = report.get("failure")
        series = torch.stack(list(report["series"].values()))
        weight = self.merge_rule.weight(report)
        own = state.pack_floats()
        way = (own - start).double().square().sum()
        integers = state.pack_integers()
        row = pack_row(
            worker=self.global_rank,
            workers=self.world_size,
            figures=(weight, float(way), float(report["tasks"]), report["seconds"]),
            failure=failure,
            series=series,
            like=own,
        )
        payload = torch.cat([own * weight, integers if self.global_rank == 0 else torch.zeros_like(integers), row])
        self._all_reduce(payload, run=self._run())
        floats, integers, rows = payload.split([own.numel(), integers.numel(), row.numel()])
        table = unpack_table(rows, workers=self.world_size, run=self._run(), shape=(series.shape[0], series.shape[1]))
        if table.failures:
            raise table.failures[0]
        mean = floats / table.weight.sum()
        state.unpack_floats(self._apply_rule(start, mean, state.parameter_size))
        state.unpack_integers(integers)
        _add_table(report, table)
        self._merging = False
        report["merge"] = {
            "merge/seconds": time.perf_counter() - began,
            "merge/drift": _drift(table, mean - start),
            "merge/bytes": float(payload.numel() * payload.element_size()),
        }
        return report

    def _apply_rule(self, start: Tensor, mean: Tensor, size: int) -> Tensor:
        """The rule decides about the parameters, the first `size` values; buffers are averaged whatever the rule."""
        return torch.cat([self.merge_rule.merge(start[:size], mean[:size]), mean[size:]])

    def _all_reduce(self, payload: Tensor, run: int) -> None:
        try:
            torch.distributed.all_reduce(payload)
        except RuntimeError as error:
            self._await_verdict()
            raise WorkerLostError(
                f"worker {self.global_rank} lost contact with another worker at the merge of run {run}: it has died, "
                f"or did not come within trainer.strategy.timeout ({self._timeout_seconds():g} s). Training has "
                "stopped; the last checkpoint is kept. The lost worker's own message, if any, stands above."
            ) from error

    def _await_verdict(self) -> None:
        """A broken connection is noticed before the launcher has seen who died; it tells more."""
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
        if self.world_size > 1:
            own = _to_cpu(checkpoint.get("optimizer_states", []))
            everyone: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
            torch.distributed.gather_object(own, everyone)
            checkpoint[CHECKPOINT_KEY] = {"workers": self.world_size, "optimizer_states": everyone}
        checkpoint.setdefault(CHECKPOINT_KEY, {"workers": 1})["merge"] = self.merge_rule.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give this worker its own moments back; with another number of workers, everyone takes worker 0's."""
        kept = checkpoint.get(CHECKPOINT_KEY)
        workers = 1 if kept is None else kept["workers"]
        if workers != self.world_size:
            rank_zero_info(
                f"The checkpoint was made by {workers} worker(s), and there are {self.world_size} now: training goes "
                "on from the merged weights, every worker with the optimizer moments of worker 0."
            )
        elif kept is not None and workers > 1:
            checkpoint = {**checkpoint, "optimizer_states": kept["optimizer_states"][self.global_rank]}
        if kept is not None:
            self.merge_rule.load_state_dict(kept["merge"])
        super().load_optimizer_state_dict(checkpoint)


def _add_table(report: RunReport, table: WorkerTable) -> None:
    """Make a worker's report the report of all workers."""
    by_worker = table.series.cpu()
    report["workers"] = {name: by_worker[:, number] for number, name in enumerate(report["series"])}
    report["series"] = {name: values.mean(dim=0) for name, values in report["workers"].items()}
    report["loss"] = report["series"]["loss"].mean()
    report["tasks"] = int(table.tasks.sum())
    report["seconds"] = float(table.seconds.max())


def _drift(table: WorkerTable, way: Tensor) -> float:
    """Root mean square distance of the workers' weights from their mean.

    From mean |d_i|^2 - |mean d_i|^2 with d_i the way that worker i went, which needs no second all-reduce.
    """
    share = (table.weight / table.weight.sum()).double()
    spread = (share * table.squared_way.double()).sum() - way.double().square().sum()
    return float(spread.clamp(min=0).sqrt())


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value

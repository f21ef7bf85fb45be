"""The workers of a training as a group: started, met, watched over, and heard together.

A worker that has died, or that does not come within `timeout` seconds, ends the training on every other. Every
collective call goes through `WorkerGroupStrategy.together`, which tells that in one line.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric.utilities.distributed import _init_dist_connection
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed import DistNetworkError

from dmaml_pl.checks import require_not_negative, require_one_of
from dmaml_pl.errors import ConfigError, NonFiniteError, WorkerLostError
from dmaml_pl.launching import restarts
from dmaml_pl.launching.signals import forget_terminal
from dmaml_pl.launching.workers import POLL_SECONDS, WorkerLauncher
from dmaml_pl.strategies.loopback import LOOPBACK, LOOPBACK_INTERFACE, own_store

LONGEST_S = 10_000_000
"""The longest timeout, in s; PyTorch counts it in milliseconds, and not without end."""

StartMethod = Literal["popen", "fork"]

T = TypeVar("T")


class WorkerGroupStrategy(DDPStrategy):
    """Of Lightning's DDP it takes the launching and the process group, not the wrapper.

    Args:
        timeout: seconds that a worker waits for the others, in a merge or a meta-iteration, before it gives up.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how the other workers of this machine come to be. "popen": they run the same command again;
            "fork": they are forked from worker 0 for each thing that the Trainer is asked for. By default the latter
            in notebooks, and in `dmaml_pl.fit`.

    Attributes:
        workers_may_change: whether workers come and go (`elastic.py`).
        remedy: what a user whose training a lost worker has stopped can do.
        stopped_together: whether the training was ended by what every worker was told at the same merge.

    Raises:
        ConfigError: a setting out of its range.

    Examples:
        >>> TaskParallelStrategy(timeout=60, process_group_backend="gloo").timeout
        60
    """

    workers_may_change = False
    remedy = (
        "The last checkpoint, if there was one yet, is kept: --ckpt_path last goes on from it, and so does auto, with "
        "--checkpoint.dirpath FOLDER, whenever the same command is started again."
    )

    def __init__(
        self,
        timeout: float = 600.0,
        process_group_backend: str | None = None,
        start_method: StartMethod | None = None,
    ) -> None:
        require_not_negative(**{"trainer.strategy.timeout": timeout})
        if not 1 <= timeout <= LONGEST_S:
            raise ConfigError(f"trainer.strategy.timeout is {timeout:g}, but must be from 1 to {LONGEST_S:,} (s).")
        if start_method is not None:
            require_one_of("trainer.strategy.start_method", start_method, ("popen", "fork"))
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout))
        self.start_method = start_method
        self.timeout = timeout
        self.stopped_together = False
        self._run = 0
        self._in_run = False
        self._asked_to_stop: BaseException | None = None
        self._at_once = False

    # -- workers ---------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "Lightning sets it first"  # noqa: S101
        forks = None if self.start_method is None else self.start_method == "fork"
        self._launcher = WorkerLauncher(self.cluster_environment, self.num_processes, self.num_nodes, forks)

    @property
    def _workers(self) -> WorkerLauncher | None:
        """The processes of the other workers, where they are ours to watch over."""
        return self._launcher if isinstance(self._launcher, WorkerLauncher) else None

    def setup_distributed(self) -> None:
        """Lightning's, by a key-value store that no other machine reaches where all workers are on this one.

        Under torchrun the store is its agent's. Only when all workers are there are they handed to PyTorch, whose own
        waiting for a worker that has died cannot be interrupted, neither by a signal nor by a thread.
        """
        if not torch.distributed.is_initialized():
            self.set_world_ranks()
            environment, device = cast("ClusterEnvironment", self.cluster_environment), self.root_device
            timeout = max(self.timeout, restarts.START_SECONDS)
            if self.num_nodes == 1:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
            _init_dist_connection(
                environment,
                self._get_process_group_backend(),
                store=self._meet(environment, timeout),
                timeout=self._timeout,
                device_id=None if device.type == "cpu" else device,
            )
        super().setup_distributed()

    def _meet(self, environment: ClusterEnvironment, timeout: float) -> Any:
        address = LOOPBACK if self.num_nodes == 1 else environment.main_address
        agent = restarts.agent_store()
        while True:
            store = agent or own_store(address, environment.main_port, self.global_rank, timedelta(seconds=timeout))
            try:
                return restarts.meet(
                    store, rank=self.global_rank, workers=self.world_size, timeout=timeout, check=self.check_workers
                )
            except DistNetworkError:
                # Where these processes have trained before: that training's store, which worker 0 has closed.
                if agent or self.global_rank == 0:
                    raise

    def check_workers(self) -> None:
        """Cheap enough for every meta-iteration: no communication, only what this process has been told.

        In a run of several workers a signal raises nothing here: it is told to all at the run's end, which comes now.

        Raises:
            WorkerLostError: a worker that this process started has ended.
            SIGTERMException: this process was asked to end.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        lost = self._workers is not None and self._workers.lost
        nobody_to_tell = self.world_size == 1 or not self._in_run
        if self._asked_to_stop is not None and (lost or nobody_to_tell):
            raise self._asked_to_stop
        if lost:
            raise WorkerLostError(
                f"{lost[0]} while run {self._run} was under way. Training has stopped on every worker. {self.remedy}"
            )

    # -- signals ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Answer SIGTERM (pre-emption), SIGHUP (a closed terminal) and Ctrl-C within a meta-iteration.

        On every worker of this machine.

        Lightning's own handler makes a collective call inside the signal handler, which deadlocks with a merge.
        """
        super().on_train_start()
        self._at_once = self._in_run = self.stopped_together = False
        self._listen()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Answer signals at once: the last merge is kept before a validation begins."""
        self.check_workers()
        self._at_once = True
        try:
            return super().validation_step(*args, **kwargs)
        finally:
            self._at_once = False

    def on_test_start(self) -> None:
        """Answer signals at once: a test has nothing to lose."""
        super().on_test_start()
        self._at_once = True
        self._listen()
        self.check_workers()

    def on_predict_start(self) -> None:
        """As for a test."""
        super().on_predict_start()
        self._at_once = True
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(signal.SIGHUP, self._hear)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            forget_terminal()
        pressed_again = number == signal.SIGINT and isinstance(self._asked_to_stop, KeyboardInterrupt)
        if self._asked_to_stop is None:  # first, or a worker that has ended by then would be missed
            self._asked_to_stop = KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException()
        if self._workers is not None:
            self._workers.kill(signal.SIGTERM)
        if self._at_once or pressed_again:
            raise self._asked_to_stop

    def on_exception(self, exception: BaseException) -> None:
        """End the other workers too; they may be waiting for this one."""
        super().on_exception(exception)
        if self._workers is not None and not isinstance(exception, NonFiniteError):
            self._workers.look()  # before they are all ended from here
            self._workers.stop_workers()
        if isinstance(exception, KeyboardInterrupt):
            self._asked_to_stop = None  # it was for what was under way; the same Trainer may be asked for more

    # -- calls that all workers make together ----------------------------------------------------------------------

    def together(self, call: Callable[[], T]) -> T:
        """Make a collective call.

        Raises:
            WorkerLostError: a worker has died or did not come in time.
        """
        try:
            return call()
        except RuntimeError as error:
            self.await_verdict()
            raise WorkerLostError(
                f"worker {self.global_rank} lost contact with another worker in run {self._run}: it has died, or did "
                f"not come within trainer.strategy.timeout ({self.timeout:g} s). Its own message, if any, stands above."
                f" {self.remedy}"
            ) from error

    def gather(self, own: Any) -> list[Any]:
        """What every worker gave, by worker, on every worker."""

        def call() -> list[Any]:
            everyone: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyone, own)
            return everyone

        return [own] if self.world_size == 1 else self.together(call)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's."""
        self.together(lambda: super(WorkerGroupStrategy, self).barrier(*args, **kwargs))

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Lightning's."""
        return self.together(lambda: super(WorkerGroupStrategy, self).broadcast(obj, src))

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Lightning's."""
        return self.together(lambda: super(WorkerGroupStrategy, self).reduce(tensor, group, reduce_op))

    def await_verdict(self) -> None:
        """A broken connection is noticed before the launcher has seen who died; it tells more.

        Raises:
            WorkerLostError: the launcher knows which worker has ended.
            SIGTERMException: this process was asked to end.
        """
        self._in_run = False
        deadline = time.monotonic() + 4 * POLL_SECONDS
        while time.monotonic() < deadline:
            self.check_workers()
            time.sleep(POLL_SECONDS / 5)

    def _module(self) -> Any:
        assert self.lightning_module is not None, "Lightning connects the module before it uses the strategy"  # noqa: S101
        return self.lightning_module

"""What is done with a Trainer, from the checks before it to what the trackers are told of its end.

The command line and `dmaml_pl.fit` both do it so.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from data_modules import TaskDataModule
from dmaml_pl.checkpoints import RunCheckpoint
from dmaml_pl.cli import resume
from dmaml_pl.cli.parts import blame, parts_of
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.cli.recorder import trackers
from dmaml_pl.errors import DmamlError, LeftBehindError, WorkerLostError, in_one_line
from dmaml_pl.launching import restarts
from dmaml_pl.launching.signals import raised_at
from dmaml_pl.launching.supervisor import supervise
from dmaml_pl.launching.waits import LONG_S, told_after
from dmaml_pl.modules import MetaLearning
from dmaml_pl.strategies import WorkerStrategy
from dmaml_pl.strategies.elastic import ElasticStrategy, among_those_who_come_and_go
from dmaml_pl.tracking.mlflow_run import ERROR as ERROR_TAG
from dmaml_pl.tracking.relay import Relay, RelayedTracker
from dmaml_pl.tracking.tracker import MLflowTracker

T = TypeVar("T")


class Session:
    """A Trainer, and what it is to train or evaluate.

    Args:
        trainer: with its callbacks.
        model: to train or evaluate.
        data: its tasks.
        meta_test: whether a training ends in one.
        launched: whether something else has started the workers.
    """

    def __init__(
        self, trainer: pl.Trainer, model: MetaLearning, data: TaskDataModule, *, meta_test: bool, launched: bool = False
    ) -> None:
        self.trainer: Any = trainer
        self.model = model
        self.data = data
        self.meta_test = meta_test
        self.launched = launched
        self.folder = resume.checkpoint_folder(trainer)
        self._handed: Path | None = None
        self._elastic: ElasticStrategy | None = None

    def carry_out(self, stage: str, wanted: str | None, call: Callable[[str | None], T]) -> T:
        """Check everything, then do it; what fails outside the Trainer leaves no MLflow run that seems to be running.

        Args:
            stage: "fit", "validate", "test" or "predict".
            wanted: the checkpoint to go on with: `best`, `last`, `auto`, a file, or none.
            call: does it, from the file of that checkpoint.

        Raises:
            DmamlError: a setting cannot work, or a worker was lost.
        """
        one_line: AbstractContextManager[None] = in_one_line((MisconfigurationException,))
        try:
            try:
                with raised_at(SIGTERMException, signal.SIGTERM, signal.SIGHUP):
                    origin = self.check(stage, wanted)
                    self._open_trackers(stage, origin)
                    one_line = nullcontext()  # from now on a user's own errors are for who calls from Python, too
                    return call(None if origin.checkpoint is None else str(origin.checkpoint))
            except RuntimeError:
                # A worker that dies while another waits for it elsewhere than at a merge, as in a validation.
                if isinstance(self.trainer.strategy, WorkerStrategy):
                    self.trainer.strategy.await_verdict()
                raise
        except LeftBehindError:
            raise
        except BaseException as error:
            self._tell_trackers(error)
            if isinstance(error, Exception) and not isinstance(error, DmamlError):
                blame(error, parts_of(self.trainer, self.model, self.data))
            if isinstance(error, SIGTERMException | SystemExit | KeyboardInterrupt):
                again = "Stopped. The same command begins it again."
                if stage == "fit":
                    again = resume.how_to_go_on(self.trainer, self.folder, launched=self.launched)
                error.add_note(again)
            with one_line:
                raise
        finally:
            if self._handed is not None:
                self._handed.unlink(missing_ok=True)

    @property
    def supervises(self) -> bool:
        """Whether this process is to start workers that come and go, and is none of them."""
        return getattr(self.trainer.strategy, "elastic", False) and "LOCAL_RANK" not in os.environ

    def supervise(self, wanted: str | None) -> int:
        """Check everything, then keep the workers of this machine until the training has ended.

        Args:
            wanted: as for `carry_out`.

        Returns:
            The exit code.

        Raises:
            DmamlError: a setting cannot work.
        """
        with raised_at(SIGTERMException, signal.SIGTERM, signal.SIGHUP):
            self.check("fit", wanted)
            return supervise(self.trainer.num_devices, self.trainer.strategy.timeout)

    def meta_test_best(self) -> None:
        """Meta-test the best checkpoint of the training that has just ended, where that is wanted."""
        wanted = self.meta_test and not getattr(self.trainer, "fast_dev_run", False)
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if wanted and self.trainer.state.finished:
            if not best and isinstance(self.trainer.checkpoint_callback, RunCheckpoint):
                rank_zero_info(
                    "The training had no validation, so that there is no best.ckpt: its last weights are meta-tested. "
                    "Validations come every trainer.val_check_interval runs."
                )
            self.trainer.test(self.model, datamodule=self.data, ckpt_path=best or None, verbose=False)

    def _tell_trackers(self, error: BaseException) -> None:
        for tracker in trackers(self.trainer):
            if (
                isinstance(error, WorkerLostError) and not tracker.visits
            ):  # the Trainer may have seen only the connection break
                tracker.set_tags({ERROR_TAG: f"{type(error).__name__}: {error}"})
            if isinstance(error, SIGTERMException):
                tracker.was_stopped()
            # Else the Trainer has told its loggers, unless what it tells before has failed.
            if not self.trainer.interrupted or tracker.is_running:
                tracker.finalize("failed")

    def check(self, stage: str, wanted: str | None) -> restarts.Origin:
        """Check everything that can be checked before workers are started.

        Args:
            stage: as for `carry_out`.
            wanted: the same.

        Returns:
            What is gone on with.

        Raises:
            DmamlError: a setting cannot work.
        """
        meta_test = stage == "test" or (stage == "fit" and self.meta_test)
        said = "Still loading data, and trying model.network with model.algorithm and model.objective on one task ..."
        with told_after(LONG_S, partial(rank_zero_only(print), said, file=sys.stderr, flush=True)):
            check_before(stage, self.trainer, self.model, self.data, meta_test=meta_test)
        if stage == "fit" and getattr(self.trainer.strategy, "elastic", False) and not self.supervises:
            self._elastic = among_those_who_come_and_go(self.trainer.strategy)
            handed = self._elastic.join()
            if handed is not None:
                with tempfile.NamedTemporaryFile(suffix=".ckpt", delete=False) as file:
                    torch.save(handed, file)
                wanted = os.environ[resume.RESOLVED_CHECKPOINT] = file.name
                self._handed = Path(file.name)
        optimizer = self.model.trial_optimizer()
        joins = self._handed is not None
        return resume.find_origin(wanted, stage, self.trainer, self.model, optimizer, joins=joins)

    def _open_trackers(self, stage: str, origin: restarts.Origin) -> None:
        if resume.is_worker_zero():
            opened = trackers(self.trainer)
            for tracker in opened:
                tracker.open(origin.mlflow_run_id, visits=stage != "fit" and origin.mlflow_run_id is not None)
            if stage == "fit":
                restarts.remember(restarts.BEGUN, json.dumps(opened[0].version if opened else None))
        elif self._elastic is not None:  # whose machine may never have had a worker 0
            restarts.remember(restarts.BEGUN, json.dumps(origin.mlflow_run_id))
        if self._elastic is not None:
            loggers = self.trainer.loggers
            for number, logger in enumerate(loggers):
                if isinstance(logger, MLflowTracker):
                    in_mind = origin.in_mind[number] if number < len(origin.in_mind) else ()
                    # Another training's meetings have other numbers.
                    logged = in_mind if self._handed else [(0, operation) for _, operation in in_mind]
                    relay = Relay(self._elastic.quorum, logged)
                    loggers[number] = RelayedTracker(logger, relay, origin.mlflow_run_id)
            self.trainer.loggers = loggers

"""When a training keeps checkpoints: `best` at validations, `last` at merges, as often as is cheap."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loops.evaluation_loop import RestartStage
from pytorch_lightning.loops.utilities import _is_max_limit_reached
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dmaml_pl.checkpoints.files import WholeFileIO, remove_leftovers
from dmaml_pl.checkpoints.last_merge import Held, LastMerge
from dmaml_pl.checks import require_positive
from dmaml_pl.errors import CheckpointError, ConfigError, NonFiniteError
from dmaml_pl.launching import restarts
from dmaml_pl.runs import RunReport, strategy_of_runs

PATIENCE = 50.0
"""A checkpoint that took a second is not renewed before the runs after it have taken so many: 2 % of their time."""


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best and the last merged weights: `best.ckpt` and `last.ckpt` of each training.

    A file is whole or not there, whenever the process that writes it is killed or its disk is full; the one before
    stays until then. Between two renewals the last merge is held in memory, and is written when the training is asked
    to stop (SIGTERM, Ctrl-C) or stops itself, so that only a process that is killed outright can lose merges.

    Args:
        monitor: metric by which the best is chosen, such as "val/loss" or "val/accuracy".
        mode: whether the best is the smallest ("min") or the largest ("max").
        dirpath: folder of the checkpoints; by default one of its own for every training, below the logger's folder.
            With workers on several machines it must lie on a disk that all of them share.
        every_n_runs: renew `last` after every so many merges: SIGKILL, or a loss of power, loses no more than these.
            By default as often as it takes less than 2 % of the training's time: after every run that takes a second
            or longer, for small networks. At validations and at the end it is renewed in any case.

    Attributes:
        decides: whether `best` and `last` are this callback's, whatever else keeps checkpoints beside it.

    Raises:
        ConfigError: `every_n_runs` is not greater than zero.
    """

    decides = True

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        dirpath: str | None = None,
        every_n_runs: int | None = None,
    ) -> None:
        if every_n_runs is not None:
            require_positive(**{"checkpoint.every_n_runs": every_n_runs})
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_runs = every_n_runs
        self._runs_since = 0
        self._seconds_since = 0.0
        self._cost = 0.0
        self._told_of_last = False
        self._last_merge: LastMerge | None = None

    def check_writable(self) -> None:
        """Check that a folder that the user has chosen can be written, before there is anything to lose.

        Raises:
            ConfigError: it cannot.
        """
        if self.dirpath is None:
            return
        try:
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dirpath):
                pass
        except OSError as error:
            raise ConfigError(
                f"checkpoint.dirpath is {self.dirpath}, which cannot be written ({error.strerror}): set it to a folder "
                "that can."
            ) from error

    def check_beside(self, other: ModelCheckpoint) -> None:
        """Check that a user's own ModelCheckpoint leaves `best.ckpt` and `last.ckpt` to this one.

        Raises:
            ConfigError: it would write one of them.
        """
        names = {str(other.filename), other.CHECKPOINT_NAME_LAST if other.save_last else ""}
        taken = names & {str(self.filename), self.CHECKPOINT_NAME_LAST}
        if taken and other.dirpath == self.dirpath:
            raise ConfigError(
                f"trainer.callbacks has a {type(other).__name__} that would write {min(taken)}{self.FILE_EXTENSION}, "
                "which the training's own checkpoints are called (checkpoint.dirpath): give it a dirpath of its own."
            )

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As Lightning's; a resumed training's folder is meant not to be empty."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")  # the resumed training's own files
            super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user may have plugged in another
            trainer.strategy.checkpoint_io = WholeFileIO()
        files = trainer.strategy.checkpoint_io
        if stage != "fit" or "://" in str(self.dirpath) or not isinstance(files, WholeFileIO):
            return
        folder = Path(str(self.dirpath))
        self._last_merge = LastMerge(
            folder / f"last{self.FILE_EXTENSION}", files, lambda number: _stop_others(trainer, number)
        )
        if trainer.is_global_zero:
            remove_leftovers(folder)
            self._last_merge.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for the signals that ask to stop; go on where a checkpoint was kept, which may be in mid-epoch."""
        super().on_train_start(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end:
            # A validation that was due at that merge comes first now; Lightning would leave it out.
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # noqa: SLF001
            loop.val_loop.restarting = False
        if self._last_merge is not None:
            self._last_merge.processes = _processes(trainer)
            self._last_merge.watch()

    def on_run_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: RunReport) -> None:
        """A run has been merged and logged: keep it on the disk if that is due, and in memory if not."""
        if self._idle(trainer) or _is_max_limit_reached(trainer.global_step, trainer.max_steps):
            return  # the last run is kept after its validation, so that a resumed training makes that, too
        if self._last_merge is not None and len(self._last_merge.processes) != trainer.world_size:
            self._last_merge.processes = _processes(trainer)  # a worker was lost, and the others go on
        self._runs_since += 1
        self._seconds_since += report["seconds"]  # the same on every worker, who must all write together
        if self._due():
            self._renew_last(trainer)
        elif self._last_merge is not None:
            self._last_merge.hold(_at_hand(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Renew the best if it was beaten, and the last always."""
        if not self._idle(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._renew_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep runs that were merged after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._renew_last(trainer)
        self._unwatch()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Bring the last merge to the disk, if all workers are there to do so."""
        if self._last_merge is not None and (
            isinstance(exception, SIGTERMException | KeyboardInterrupt | NonFiniteError)
            or self._last_merge.asked_to_stop
            or trainer.world_size == 1
        ):
            self._last_merge.bring_to_disk()
        self._unwatch()

    # -- the last --------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        if self.every_n_runs is not None:
            return self._runs_since >= self.every_n_runs
        return self._seconds_since >= PATIENCE * self._cost

    def _renew_last(self, trainer: pl.Trainer) -> None:
        began = time.perf_counter()
        for logger in trainer.loggers:  # so that what a resumed training does not do again is not lost
            keep = getattr(logger, "keep", None)
            if keep is not None:
                keep()
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if trainer.is_global_zero and not self._told_of_last:
            restarts.remember_last(Path(self.last_model_path))
            self._told_of_last = True
        if self.every_n_runs is None:
            self._cost = trainer.strategy.broadcast(time.perf_counter() - began)
        self._runs_since, self._seconds_since = 0, 0.0

    def _idle(self, trainer: pl.Trainer) -> bool:
        """Lightning's question whether to skip saving, which may have been done for the same merge before."""
        self._last_global_step_saved, kept = -1, self._last_global_step_saved
        try:
            return self._should_skip_saving_checkpoint(trainer)
        finally:
            self._last_global_step_saved = kept

    def _unwatch(self) -> None:
        if self._last_merge is not None:
            self._last_merge.unwatch()


def _at_hand(trainer: pl.Trainer) -> Held:
    """The merge that has just been made, not yet copied."""
    strategy: Any = trainer.strategy
    first = trainer.is_global_zero
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False) if first else None  # noqa: SLF001
    return Held(
        step=trainer.global_step,
        worker=trainer.global_rank,
        workers=trainer.world_size,
        moments=[strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        checkpoint=checkpoint,
        strategy_state=getattr(strategy, "_own_state", dict)() if first else {},
    )


def _processes(trainer: pl.Trainer) -> list[Any]:
    """Machine and process of every worker.

    Raises:
        CheckpointError: the workers do not stand at the same meta-iteration.
    """
    own = (socket.gethostname(), os.getpid(), trainer.global_step)
    strategy = strategy_of_runs(trainer)
    everyone = [own] if strategy is None else strategy.gather(own)
    if len({step for _, _, step in everyone}) > 1:
        raise CheckpointError(
            "The workers go on from different checkpoints, of meta-iterations "
            f"{', '.join(str(step) for _, _, step in everyone)}: set checkpoint.dirpath to a folder on a disk that all "
            "machines share."
        )
    return [(host, process) for host, process, _ in everyone]


def _stop_others(trainer: pl.Trainer, number: int) -> None:
    """Let the workers that this process has started end too, even if the main thread waits for them."""
    remember = getattr(trainer.strategy, "was_asked_to_stop", None)
    if remember is not None:
        remember(number)  # first, or a worker that has ended by then would be missed
    launcher = trainer.strategy.launcher
    kill = getattr(launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGTERM)

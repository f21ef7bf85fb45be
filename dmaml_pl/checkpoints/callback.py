"""When a training keeps checkpoints: `best` at validations, `last` at merges, as often as is cheap."""

import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loops.evaluation_loop import RestartStage
from pytorch_lightning.loops.utilities import _is_max_limit_reached
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from dmaml_pl.checkpoints.files import WholeFileIO, remove_leftovers
from dmaml_pl.checks import require_counts
from dmaml_pl.errors import CheckpointError, ConfigError, LeftBehindError
from dmaml_pl.launching import restarts
from dmaml_pl.runs import CHECKPOINT_KEY, RunReport, strategy_of_runs

PATIENCE = 50.0
"""A checkpoint that took a second is not renewed before the runs after it have taken so many: 2 % of their time."""


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best and the last merged weights: `best.ckpt` and `last.ckpt` of each training.

    A file is whole or not there, whenever the process that writes it is killed or its disk is full; the one before
    stays until then. A checkpoint after every merge would cost a training with short runs more than the runs
    themselves, so between two renewals the last merge is held in memory, which takes a millisecond. It is written
    before a validation, and when the workers stop together (SIGTERM, Ctrl-C, a loss that is not finite), so that only
    a process that is killed outright can lose merges.

    Args:
        monitor: metric by which the best is chosen, such as "val/loss" or "val/accuracy".
        mode: whether the best is the smallest ("min") or the largest ("max").
        dirpath: folder of the checkpoints; by default one of its own for every training, below the logger's folder.
            With workers on several machines it must lie on a disk that all of them share.
        every_n_runs: renew `last` after every so many merges: SIGKILL, or a loss of power, loses no more than these.
            By default as often as it takes less than 2 % of the training's time: after every run that takes a second
            or longer, for small networks. At validations and at the end it is renewed in any case.

    Raises:
        ConfigError: `every_n_runs` is not greater than zero.

    Examples:
        >>> best = RunCheckpoint(monitor="val/accuracy", mode="max")
        >>> best.monitor
        'val/accuracy'
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        dirpath: str | None = None,
        every_n_runs: int | None = None,
    ) -> None:
        if every_n_runs is not None:
            require_counts(**{"checkpoint.every_n_runs": every_n_runs})
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
        self._trains = False
        self._held: dict[str, Any] | None = None

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
        self._trains = stage == "fit"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")  # the resumed training's own files
            super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user may have plugged in another
            trainer.strategy.checkpoint_io = WholeFileIO()
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            remove_leftovers(Path(str(self.dirpath)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's, which warns where checkpoints are kept in another folder than before: said as it is here."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            super().load_state_dict(state_dict)
        before = state_dict.get("dirpath")
        if self._trains and before is not None and before != self.dirpath:
            rank_zero_info(f"Checkpoints were kept in {before}, and now in {self.dirpath}, where best is chosen anew.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where a checkpoint was kept, which may be in mid-epoch.

        Raises:
            CheckpointError: the workers go on from different checkpoints.
        """
        super().on_train_start(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end:
            # A validation that was due at that merge comes first now; Lightning would leave it out.
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # noqa: SLF001
            loop.val_loop.restarting = False
        strategy = strategy_of_runs(trainer)
        steps = [trainer.global_step] if strategy is None else strategy.gather(trainer.global_step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"The workers go on from different checkpoints, of meta-iterations {', '.join(map(str, steps))}: set "
                "checkpoint.dirpath to a folder on a disk that all machines share."
            )

    def on_run_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: RunReport) -> None:
        """A run has been merged and logged: keep it on the disk if that is due, and in memory if not."""
        if getattr(trainer.strategy, "merge_under_way", False):
            return  # a checkpoint would wait for it
        if self._idle(trainer) or _is_max_limit_reached(trainer.global_step, trainer.max_steps):
            return  # the last run is kept after its validation, so that a resumed training makes that, too
        self._runs_since += 1
        self._seconds_since += report["seconds"]  # the same on every worker, who must all write together
        if self._due():
            self._renew_last(trainer)
        else:
            self._hold(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave nothing to lose: a signal ends a validation at once."""
        self._write_held(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Renew the best if it was beaten, and the last always."""
        if not self._idle(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._renew_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep runs that were merged after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._renew_last(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Bring the last merge to the disk, if all workers are there to do so.

        Never raises: the process is ending already, and a reason that stands in the way is told in one line.
        """
        strategy = strategy_of_runs(trainer)
        alone = trainer.world_size == 1 or (strategy is not None and strategy.workers_may_change)
        if isinstance(exception, LeftBehindError):
            return  # what the others have kept is newer
        if alone or getattr(trainer.strategy, "stopped_together", False):
            try:
                self._write_held(trainer)
            except CheckpointError as error:
                print(f"dmaml: {error}", file=sys.stderr, flush=True)

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
        changes = getattr(trainer.strategy, "workers_may_change", False)  # and with them who is worker 0
        if (trainer.is_global_zero or changes) and not self._told_of_last:
            restarts.remember(restarts.LAST, str(Path(self.last_model_path).absolute()))
            self._told_of_last = True
        if self.every_n_runs is None:
            self._cost = trainer.strategy.broadcast(time.perf_counter() - began)
        self._runs_since, self._seconds_since, self._held = 0, 0.0, None

    def _hold(self, trainer: pl.Trainer) -> None:
        """Copy the merge that has just been made: on worker 0 all of it, elsewhere the worker's own moments."""
        held = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # noqa: SLF001
        held[CHECKPOINT_KEY] = getattr(trainer.strategy, "state_to_keep", dict)()
        if not trainer.is_global_zero:
            held = {name: held[name] for name in ("optimizer_states", CHECKPOINT_KEY)}
        self._held = _copied(held)

    def _write_held(self, trainer: pl.Trainer) -> None:
        """Write what is held, if it is; all workers come here together."""
        held, self._held = self._held, None
        if held is not None:
            trainer.strategy.save_checkpoint(held, f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")

    def _idle(self, trainer: pl.Trainer) -> bool:
        """Lightning's question whether to skip saving, which may have been done for the same merge before."""
        self._last_global_step_saved, kept = -1, self._last_global_step_saved
        try:
            return self._should_skip_saving_checkpoint(trainer)
        finally:
            self._last_global_step_saved = kept


def _copied(part: Any) -> Any:
    """A part of a checkpoint on its own, on the CPU.

    Lightning's walk through collections took longer than all else that a short run is followed by.
    """
    if isinstance(part, Tensor):
        return part.detach().to("cpu", copy=True)
    if isinstance(part, dict):
        kept = copy.copy(part)
        kept.update((name, _copied(value)) for name, value in part.items())
        return kept
    return type(part)(map(_copied, part)) if type(part) in (list, tuple) else part

"""What the end of a training writes into its MLflow run: how it ended, its description and its checkpoints."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dmaml_pl.errors import redact, words_of
from dmaml_pl.tracking.description import NOTE, describe_training, may_describe
from dmaml_pl.tracking.mlflow_run import COMMAND, COMMIT, ERROR
from dmaml_pl.tracking.operations import describe, end
from dmaml_pl.tracking.sender import Sender
from dmaml_pl.tracking.store import own_command

_log = logging.getLogger(__name__)


class EndStatus(StrEnum):
    """Status of an MLflow run; the values are MLflow's."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


PATIENCE_S = {EndStatus.FINISHED: 10.0, EndStatus.FAILED: 10.0, EndStatus.KILLED: 2.0}
"""Seconds that the end of a training waits for a store that is away; who is killed may not have long."""


class Ending:
    """Writes how a training ended, and that it goes on where it does.

    Args:
        sender: to the MLflow run.
        figures: the last values of its metrics by name, kept up to date by whoever logs them.
        note: the description that it has already, if any; one that a person wrote stays.
        save_dir: folder of the tracking as the user wrote it.

    Attributes:
        visits: whether this process only evaluates the training, whose end is then another's to write.
    """

    def __init__(self, sender: Sender, figures: Mapping[str, float], note: str | None, save_dir: str) -> None:
        self.outcome = EndStatus.RUNNING
        self.visits = False
        self.figures = dict(figures)
        self._callbacks: dict[str, ModelCheckpoint] = {}
        self._uploaded: dict[str, tuple[Path, int]] = {}
        self._sender = sender
        self._may_describe = may_describe(note)
        self._save_dir = save_dir

    def watch(self, callback: ModelCheckpoint) -> None:
        """Ask this callback for its checkpoints at the end; Lightning hands over a weak proxy of it."""
        self._callbacks[callback.state_key] = callback

    def write(self, status: str, error: BaseException | None) -> None:
        """Write the end as for `MLflowTracker.finalize`, send what waits, and say so where that cannot be."""
        failed = status == "failed" and not isinstance(error, KeyboardInterrupt | SIGTERMException)
        outcome = EndStatus.FINISHED if status == "success" else EndStatus.FAILED if failed else EndStatus.KILLED
        sender = self._sender
        if self.visits:
            self.outcome = outcome
            if outcome == EndStatus.FINISHED:
                self._describe("")
        elif self.outcome not in (EndStatus.FAILED, EndStatus.KILLED):
            self.outcome = outcome
            message = "" if error is None else redact(f"{type(error).__name__}: {words_of(error)}")
            if outcome == EndStatus.FAILED and message:
                sender.put({"do": "set_tags", "tags": {ERROR: message}})
            self._describe(message)
            if outcome == EndStatus.FINISHED:  # whoever waits for this status finds the checkpoints there
                self._put_checkpoints()
            sender.put(end(outcome))
            self._put_checkpoints()
        self._leave(outcome)

    def go_on(self) -> None:
        """Write that the training goes on after all."""
        if not self.visits:
            self._sender.put({"do": "restart"})
        self.outcome = EndStatus.RUNNING

    def correct(self) -> None:
        """Make what was taken for a failure a stop from outside."""
        if self.outcome == EndStatus.FAILED and not self.visits:
            self.go_on()
            self.outcome = EndStatus.KILLED
            self._describe("")
            self._sender.put(end(EndStatus.KILLED))
            self._leave(EndStatus.KILLED)

    def _describe(self, error: str) -> None:
        if self._may_describe:
            run = self._sender.run
            command, commit = run.started_by.get(COMMAND, ""), run.started_by.get(COMMIT, "unknown")
            outcome = run.status if self.visits else self.outcome
            text = describe_training(self.figures, outcome, error, command, commit, run.experiment_id, run.changed)
            self._sender.put({"do": "set_tags", "tags": {NOTE: text}})

    def _put_checkpoints(self) -> None:
        """Upload the best and the last checkpoint, unless they are there already."""
        files: dict[str, Path] = {}
        found = []
        for callback in self._callbacks.values():
            with suppress(ReferenceError):  # the trainer that owned it is gone
                rank = not getattr(callback, "decides", False), callback.monitor is None
                found.append((rank, {"best.ckpt": callback.best_model_path, "last.ckpt": callback.last_model_path}))
        # The training's own decides; one without a monitor calls its latest file the best, and is asked last.
        for _, paths in sorted(found, key=lambda one: one[0]):
            for name, path in paths.items():
                if path and Path(path).is_file():
                    files.setdefault(name, Path(path))
        for name, file in files.items():
            version = file, file.stat().st_mtime_ns
            if self._uploaded.get(name) != version:
                self._uploaded[name] = version
                self._sender.put_file(file, "checkpoints", name, replaced_whole=True)

    def _leave(self, outcome: EndStatus) -> None:
        sender = self._sender
        if not sender.wait(PATIENCE_S[outcome]):
            _log.warning(
                "MLflow lacks %s. They are kept in %s, and sent by:  %s",
                describe(sender.outbox.everything()),
                sender.outbox.folder,
                own_command("sync", self._save_dir),
            )
        sender.stop()

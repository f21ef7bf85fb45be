"""What MLflow knows of a study: its parent MLflow run, and which of its trainings are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.configuration import Configuration
from dmaml_pl.studies.plan import Request, Training
from dmaml_pl.studies.runner import Ended
from dmaml_pl.tracking.mlflow_run import ERROR, MLflowRun
from dmaml_pl.tracking.patience import brief_requests
from dmaml_pl.tracking.sender import deliver_left
from dmaml_pl.tracking.store import reason

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests one MLflow run in another."""

STUDY, KIND, ROLE = "dmaml.study", "dmaml.study.kind", "dmaml.study.role"
POINT, SEED, DIGEST = "dmaml.study.point", "dmaml.study.seed", "dmaml.study.digest"
_DIVERGED = "NonFiniteError"
_MOST = 50_000  # more MLflow does not return at a time


@dataclass(frozen=True)
class Child:
    """A training that is over, and the MLflow run that tells of it.

    Attributes:
        training: what was trained.
        run_id: of its MLflow run; None if it never had one.
        error: why it failed; empty if it finished.
    """

    training: Training
    run_id: str | None
    error: str = ""

    @property
    def diverged(self) -> bool:
        """Whether it failed because its loss or weights were no longer finite."""
        return self.error.startswith(_DIVERGED)


@contextmanager
def _requests() -> Iterator[None]:
    """Turn what goes wrong with the store into one line."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - seconds, and not for the study's help

    try:
        with brief_requests():
            yield
    except MlflowException as error:
        raise TrackingError(f"The tracking store does not answer: {reason(error)} The same command goes on.") from error


class Ledger:
    """The trainings of a study as their MLflow runs tell of them.

    Args:
        parent: the MLflow run of the study.
        save_dir: folder where its trainings keep what they could not send.
    """

    def __init__(self, parent: MLflowRun, save_dir: Path) -> None:
        self.parent = parent
        self._save_dir = save_dir
        self._made: dict[str, tuple[str, str]] = {}  # by digest the id, and of one that diverged the error

    @classmethod
    def open(cls, request: Request, base: Configuration) -> Ledger:
        """Make the parent MLflow run, or go on with the one of the same study, and look at its trainings.

        Whoever calls it must be alone at this study: what seems to be under way is taken for killed.

        Raises:
            TrackingError: the store cannot be used.
        """
        store = base.store
        with _requests():
            client = store.connect()
            experiment = client.get_experiment_by_name(base.experiment_name)
            known: list[Run] = []
            if experiment is not None and experiment.lifecycle_stage != "deleted":
                tags = {STUDY: request.name, KIND: request.kind, ROLE: "parent"}
                wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
                known = client.search_runs([experiment.experiment_id], wanted, max_results=1)
        if known:
            ledger = cls(MLflowRun.resume(store, known[0].info.run_id), Path(base.save_dir))
            ledger._look()
        else:
            ledger = cls(MLflowRun.create(store, base.experiment_name, request.name), Path(base.save_dir))
            ledger.parent.set_tags({STUDY: request.name, KIND: request.kind, ROLE: "parent"})
        return ledger

    def _look(self) -> None:
        for run in reversed(self._search()):
            if run.info.status == "RUNNING":
                with _requests():
                    self.parent.client.set_terminated(run.info.run_id, "KILLED")
            digest, error = run.data.tags.get(DIGEST, ""), run.data.tags.get(ERROR, "")
            if run.info.status == "FINISHED":
                self._made[digest] = (run.info.run_id, "")
            elif error.startswith(_DIVERGED):
                self._made.setdefault(digest, (run.info.run_id, error))

    def _search(self, condition: str = "") -> list[Run]:
        """The study's trainings, the newest first."""
        wanted, newest = f"tags.`{PARENT}` = '{self.parent.run_id}'{condition}", ["attributes.start_time DESC"]
        with _requests():
            return list(
                self.parent.client.search_runs([self.parent.experiment_id], wanted, max_results=_MOST, order_by=newest)
            )

    def known(self, training: Training, digest: str, *, divergence_counts: bool) -> Child | None:
        """The training, if it was made before.

        Args:
            training: the training.
            digest: of it.
            divergence_counts: whether one that diverged was made; it would diverge again.
        """
        child = Child(training, *self._made.get(digest, (None, "")))
        return child if child.run_id and (divergence_counts or not child.diverged) else None

    def outcome(self, ended: Ended, digest: str) -> Child:
        """What became of a training that has just ended; one that was killed could not write it itself."""
        training: Training = ended.job.key
        run = next(iter(self._search(f" and tags.`{DIGEST}` = '{digest}'")), None)
        if run is None:
            return Child(training, None, ended.error())
        run_id = run.info.run_id
        if run.info.status == "RUNNING":
            with _requests():
                deliver_left(self._save_dir, MLflowRun(self.parent.client, run, resumed=0))
                run = self.parent.client.get_run(run_id)
        if ended.code == 0 and run.info.status == "FINISHED":
            self._made[digest] = (run_id, "")
            return Child(training, run_id)
        error = run.data.tags.get(ERROR) or f"a worker ended with exit code {ended.code}"
        if run.info.status == "RUNNING":
            with _requests():
                self.parent.client.set_tag(run_id, ERROR, error)
                self.parent.client.set_terminated(run_id, "FAILED")
        child = Child(training, run_id, error)
        if child.diverged:
            self._made[digest] = (run_id, error)
        return child

    def history(self, child: Child, metric: str) -> dict[int, float]:
        """All values of a metric of a training, by step."""
        with _requests():
            history = self.parent.client.get_metric_history(child.run_id or "", metric)
        return {entry.step: entry.value for entry in history}

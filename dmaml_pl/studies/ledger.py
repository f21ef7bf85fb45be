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
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests one MLflow run in another."""

STUDY, KIND, ROLE = "dmaml.study", "dmaml.study.kind", "dmaml.study.role"
POINT, SEED, DIGEST = "dmaml.study.point", "dmaml.study.seed", "dmaml.study.digest"
_DIVERGED, _PRUNED = "NonFiniteError", "pruned"


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

    @property
    def pruned(self) -> bool:
        """Whether it was given up, as others were better."""
        return self.error == _PRUNED


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
        request: what the study makes; its parent MLflow run is made, or gone on with.
        base: where.

    Raises:
        TrackingError: the store cannot be used.
    """

    @_requests()
    def __init__(self, request: Request, base: Configuration) -> None:
        self._save_dir = Path(base.save_dir)
        self._client = base.store.connect()
        experiment = self._client.get_experiment_by_name(base.experiment_name)
        tags = {STUDY: request.name, KIND: request.kind, ROLE: "parent"}
        known: list[Run] = []
        if experiment is not None and experiment.lifecycle_stage != "deleted":
            known = _search(self._client, experiment.experiment_id, tags)
        mine = ""
        if not known:
            made = MLflowRun.create(base.store, base.experiment_name, request.name)
            made.set_tags(tags)
            # Others may have made one at the same moment, for the same sweep: all take the first.
            mine, known = made.run_id, _search(self._client, made.experiment_id, tags)
        first = min(known, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id
        if mine not in ("", first):
            self._client.delete_run(mine)
        self.parent = made if mine == first else MLflowRun.resume(base.store, first)

    def _trainings(self, **tags: str) -> list[Run]:
        return _search(self._client, self.parent.experiment_id, {PARENT: self.parent.run_id, **tags})

    @_requests()
    def made(self, *, divergence_counts: bool) -> dict[str, tuple[str, str]]:
        """The id and the error of each training that need not be made again, by its digest.

        One that diverged would do so again: where that is a result, it counts.
        """
        found: dict[str, tuple[str, str]] = {}
        for run in self._trainings():
            digest, error = run.data.tags.get(DIGEST, ""), run.data.tags.get(ERROR, "")
            if run.info.status == "FINISHED":
                found[digest] = (run.info.run_id, "")
            elif divergence_counts and error.startswith(_DIVERGED):
                found.setdefault(digest, (run.info.run_id, error))
        return found

    @_requests()
    def bury(self, digest: str) -> None:
        """Set right what is said of trainings that are no more, but could not say so themselves."""
        for run in self._trainings(**{DIGEST: digest}):
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")

    @_requests()
    def outcome(self, ended: Ended, *, pruned: bool = False) -> Child:
        """What became of a training that has just ended; one that was killed could not write it itself."""
        digest = ended.job.digest
        if ended.code is None:
            return Child(ended.job.key, None, _PRUNED)
        run = next(iter(self._trainings(**{DIGEST: digest})), None)
        if run is None:
            return Child(ended.job.key, None, ended.error())
        if run.info.status == "RUNNING":
            deliver_left(self._save_dir, MLflowRun(self._client, run, resumed=0))
            run = self._client.get_run(run.info.run_id)
        if ended.code == 0 and run.info.status == "FINISHED":
            return Child(ended.job.key, run.info.run_id)
        if pruned:
            self.bury(digest)
            self._client.set_tag(run.info.run_id, ERROR, _PRUNED)
            return Child(ended.job.key, run.info.run_id, _PRUNED)
        error = run.data.tags.get(ERROR) or f"a worker ended with exit code {ended.code}"
        if run.info.status == "RUNNING":
            self._client.set_tag(run.info.run_id, ERROR, error)
            self._client.set_terminated(run.info.run_id, "FAILED")
            self.bury(digest)
        return Child(ended.job.key, run.info.run_id, error)

    @_requests()
    def metrics(self, child: Child) -> dict[str, float]:
        """The last value of each metric of a training."""
        return dict(self._client.get_run(child.run_id or "").data.metrics)

    @_requests()
    def history(self, child: Child, metric: str) -> dict[int, float]:
        """All values of a metric of a training, by step."""
        return {entry.step: entry.value for entry in self._client.get_metric_history(child.run_id or "", metric)}

    def so_far(self, training: Training, digest: str, metric: str) -> dict[int, float]:
        """The same of a training that may be under way."""
        run = next(iter(self._trainings(**{DIGEST: digest})), None)
        return {} if run is None else self.history(Child(training, run.info.run_id), metric)


def _search(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> list[Run]:
    """The MLflow runs with these tags, the newest first."""
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    most = 50_000  # more MLflow does not return at a time
    return list(client.search_runs([experiment_id], wanted, max_results=most, order_by=["attributes.start_time DESC"]))

"""A study under way: what is checked before it, its parent MLflow run, and which trainings are still to be made."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.plan import Point, Request, Training
from dmaml_pl.studies.resolved import Resolved
from dmaml_pl.studies.runner import Ended, Job, Runner
from dmaml_pl.tracking.mlflow_run import ERROR, MLflowRun
from dmaml_pl.tracking.patience import brief_requests

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests one MLflow run in another."""

STUDY, KIND, POINT, SEED, DIGEST = (f"dmaml.study{part}" for part in ("", ".kind", ".point", ".seed", ".digest"))
_PAGE = 200


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
        return self.error.startswith("NonFiniteError")


class Study:
    """The trainings of a study, each made once, however often the study is started.

    Args:
        request: what the user asks of every training.
        base: the configuration that they vary.
    """

    def __init__(self, request: Request, base: Resolved) -> None:
        self.request = request
        self.base = base
        self.output = Path(request.output or Path(base.save_dir) / "studies" / request.name)
        # Judging more adaptation steps than those of training costs time, and no study looks at it.
        few = (("model.evaluation_steps", "1"),) if base.has("model.evaluation_steps") else ()
        self._own: tuple[tuple[str, str], ...] = few
        self._runner = Runner(request.jobs)
        self._finished: dict[str, str] = {}
        self._diverged: dict[str, tuple[str, str]] = {}
        self._parent: MLflowRun | None = None
        self.failed: list[Child] = []

    @classmethod
    def prepare(cls, request: Request) -> Study:
        """Read the configuration, and check it for one worker.

        Raises:
            ConfigError: it cannot be trained, or no study be made of it.
        """
        _check_files(request.configs)
        Runner().warm_up()
        importlib.import_module("mlflow")  # takes seconds, while the server that was just started imports its own
        alone = Point("the configuration", 1)
        (settings,) = _resolve([Planned(alone.label, 1, request.command(last=alone.overrides))])
        return cls(request, Resolved(settings))

    def check(self, points: Sequence[Point]) -> None:
        """Check a training of each point.

        Raises:
            ConfigError: names the setting, and the point where that is not the number of workers alone.
        """
        trainings = [Training(point, self.base.seed) for point in points]
        _resolve([Planned(one.point.label, one.point.workers, self._command(one, "", "")) for one in trainings])

    # -- its MLflow run --------------------------------------------------------------------------------------------

    @property
    def parent(self) -> MLflowRun:
        """The MLflow run of the study; only while it is open."""
        assert self._parent is not None, "the study is not open"  # noqa: S101
        return self._parent

    @contextmanager
    def open(self, options: dict[str, Any]) -> Iterator[None]:
        """Make the parent MLflow run, or go on with it; its status tells how the block ended.

        Args:
            options: the study's own settings, to be logged as parameters.

        Raises:
            ConfigError: another process is at the same study.
            TrackingError: the store cannot be used.
        """
        with self._alone():
            self._parent = self._find_parent()
            self._parent.set_tags({STUDY: self.request.name, KIND: self.request.kind})
            self._parent.log_environment()
            self._parent.log_params({f"study.{name}": str(value) for name, value in options.items()})
            self._look_at_children()
            status = "FAILED"
            try:
                yield
                status = "FAILED" if self.failed else "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                self._parent.end(status)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise ConfigError(
                f"Another process is at the study in {self.output}: wait for it, or give another --name."
            ) from error

    def _find_parent(self) -> MLflowRun:
        store = self.base.store
        with brief_requests():
            client = store.connect()
            experiment = client.get_experiment_by_name(self.base.experiment_name)
            known = []
            if experiment is not None and experiment.lifecycle_stage != "deleted":
                wanted = f"tags.`{STUDY}` = '{self.request.name}' and tags.`{KIND}` = '{self.request.kind}'"
                known = [
                    run
                    for run in client.search_runs([experiment.experiment_id], wanted, max_results=_PAGE)
                    if PARENT not in run.data.tags
                ]
        if known:
            return MLflowRun.resume(store, known[0].info.run_id, again=True)
        return MLflowRun.create(store, self.base.experiment_name, self.request.name)

    def _search(self, condition: str = "") -> Iterator[Run]:
        """The study's trainings, the newest first."""
        wanted, token = f"tags.`{PARENT}` = '{self.parent.run_id}'{condition}", None
        with brief_requests():
            while True:
                page = self.parent.client.search_runs(
                    [self.parent.experiment_id],
                    wanted,
                    max_results=_PAGE,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
                yield from page
                token = page.token
                if not token:
                    return

    def _look_at_children(self) -> None:
        """Learn what is done; what was killed without a word is not under way any more, as this process is alone."""
        for run in list(self._search()):
            if run.info.status == "RUNNING":
                with brief_requests():
                    self.parent.client.set_terminated(run.info.run_id, "KILLED")
            self._note(run)

    def _note(self, run: Run) -> None:
        digest, error = run.data.tags.get(DIGEST, ""), run.data.tags.get(ERROR, "")
        if run.info.status == "FINISHED":
            self._finished.setdefault(digest, run.info.run_id)
        elif error.startswith("NonFiniteError"):
            self._diverged.setdefault(digest, (run.info.run_id, error))

    # -- its trainings ---------------------------------------------------------------------------------------------

    def seeds(self, point: Point) -> list[Training]:
        """The trainings of a point."""
        return [Training(point, self.base.seed + number) for number in range(self.request.seeds)]

    def train(self, trainings: Sequence[Training], *, divergence_counts: bool = False, what: str = "") -> list[Child]:
        """Make the trainings that have not been made yet, and tell of each.

        Args:
            trainings: in the order in which they are to be made.
            divergence_counts: whether a training that diverged is a result, and no failure.
            what: said before each line of progress.

        Returns:
            What became of each, in the same order.
        """
        digests = {training: training.digest(self.request, self._own) for training in trainings}
        known = {training: self._known(training, digests[training], divergence_counts) for training in trainings}
        done = {training: child for training, child in known.items() if child is not None}
        todo = [training for training in trainings if training not in done]
        if done:
            _say(f"{what}{len(done)} of {len(trainings)} trainings are known already.")
        jobs = [self._job(training, digests[training]) for training in todo]
        for number, ended in enumerate(self._runner.run(jobs), start=1):
            child = self._outcome(ended, digests[ended.job.key])
            done[child.training] = child
            failed = child.error and not (divergence_counts and child.diverged)
            if failed:
                self.failed.append(child)
            result = "failed" if failed else "diverged" if child.error else self._result(child)
            _say(f"{what}[{number}/{len(todo)}] {child.training.label}: {result} ({ended.seconds:.1f} s)")
            if failed:
                _say(f"{ended.last_words()}\n(all of it: {ended.job.log})")
        return [done[training] for training in trainings]

    def _known(self, training: Training, digest: str, divergence_counts: bool) -> Child | None:
        if digest in self._finished:
            return Child(training, self._finished[digest])
        if divergence_counts and digest in self._diverged:
            return Child(training, *self._diverged[digest])
        return None

    def _job(self, training: Training, digest: str) -> Job:
        log = self.output / "logs" / f"{training.file_name}.log"
        return Job(training, self._command(training, digest, self.parent.run_id), training.point.workers, log)

    def _command(self, training: Training, digest: str, parent: str) -> tuple[str, ...]:
        tags = {
            **self.base.tags,
            PARENT: parent,
            STUDY: self.request.name,
            KIND: self.request.kind,
            POINT: training.point.label,
            SEED: str(training.seed),
            DIGEST: digest,
        }
        tracked = (
            ("trainer.logger.run_name", json.dumps(f"{self.request.name}: {training.label}")),
            ("trainer.logger.tags", json.dumps(tags)),
        )
        return self.request.command(*self._own, last=(*training.overrides, *tracked))

    def _outcome(self, ended: Ended, digest: str) -> Child:
        """What the store says of a training that has ended; one that was killed could not write it itself."""
        training: Training = ended.job.key
        run = next(self._search(f" and tags.`{DIGEST}` = '{digest}'"), None)
        if run is None:
            return Child(training, None, ended.error())
        run_id = run.info.run_id
        if ended.code == 0 and run.info.status == "FINISHED":
            self._finished[digest] = run_id
            return Child(training, run_id)
        error = run.data.tags.get(ERROR) or f"a worker ended with exit code {ended.code}"
        if run.info.status == "RUNNING":
            with brief_requests():
                self.parent.client.set_tag(run_id, ERROR, error)
                self.parent.client.set_terminated(run_id, "FAILED")
        child = Child(training, run_id, error)
        if child.diverged:
            self._diverged[digest] = (run_id, error)
        return child

    def _result(self, child: Child) -> str:
        with brief_requests():
            metrics = self.parent.client.get_run(child.run_id or "").data.metrics
        value = metrics.get(self.base.metric)
        return "finished" if value is None else f"{self.base.metric} {value:.4g}"

    # -- its results -----------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Keep the files in the output folder, logs apart, with the parent MLflow run."""
        for path in sorted(self.output.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self.parent.log_file(path)

    def ui_command(self) -> str:
        """The command that shows the study in MLflow's UI, or where a server does."""
        page = f"#/experiments/{self.parent.experiment_id}/runs/{self.parent.run_id}"
        return self.base.store.ui_command(self.base.save_dir, page)


@dataclass(frozen=True)
class Planned:
    """A training to be checked: for whom it stands, its workers and its command line."""

    label: str
    workers: int
    words: tuple[str, ...]


def _resolve(planned: Sequence[Planned]) -> list[Any]:
    """Check trainings in processes of their own, and return their resolved configurations, nested."""
    folder = Path(tempfile.mkdtemp(prefix="dmaml-study-"))
    try:
        jobs = [
            Job(number, one.words, one.workers, folder / f"{number}.log", folder / f"{number}.yaml")
            for number, one in enumerate(planned)
        ]
        for ended in Runner(os.cpu_count() or 1).run(jobs):
            if ended.code:
                where = f" (for {planned[ended.job.key].label})" if len(planned) > 1 else ""
                raise ConfigError(f"{ended.error()}{where}")
        return [yaml.safe_load((folder / f"{job.key}.yaml").read_text(encoding="utf-8")) for job in jobs]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_files(configs: Sequence[str]) -> None:
    for config in configs:
        if not Path(config).is_file():
            raise ConfigError(f"--config is {config}, but there is no such file.")


def _say(text: str) -> None:
    print(text, flush=True)

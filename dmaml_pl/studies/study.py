"""A study under way: what is checked before it, its parent MLflow run, and which trainings are still to be made."""

import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dmaml_pl.console.meter import Meter
from dmaml_pl.errors import ConfigError
from dmaml_pl.launching.waits import LONG_S, told_after
from dmaml_pl.studies.cluster import choose
from dmaml_pl.studies.configuration import Configuration
from dmaml_pl.studies.ledger import DIGEST, KIND, PARENT, POINT, ROLE, SEED, STUDY, Child, Ledger
from dmaml_pl.studies.local import Local, server
from dmaml_pl.studies.plan import Point, Request, Training
from dmaml_pl.studies.runner import Job, make


class Study:
    """The trainings of a study, each made once, however often the study is started.

    To make one reads the configuration that is varied, and checks it for one worker.

    Args:
        request: what the user asks of every training.

    Raises:
        ConfigError: it cannot be trained, or no study be made of it.
    """

    ledger: Ledger
    """What MLflow knows of the study; only while it is open."""

    def __init__(self, request: Request) -> None:
        server()
        importlib.import_module("mlflow")  # takes seconds, while the server that was just started imports its own
        alone = request.command(Point("", 1).overrides, defaults={})
        (settings,) = _resolve({"the configuration": alone})
        self.request = request
        self.base = Configuration(settings)
        self.folder = Path(self.base.save_dir) / "studies" / request.name
        self.failed: list[Child] = []
        accelerator = str(self.base.find("trainer.accelerator"))
        self._launcher = choose(request.launcher, request.resources, self.folder, accelerator)

    def check(self, points: Sequence[Point]) -> None:
        """Check a training of each point.

        Raises:
            ConfigError: names the setting, and the point where that is not the number of workers alone.
        """
        _resolve({p.label: self._command(Training(p, self.base.seed), "", "") for p in points})

    @contextmanager
    def open(self, options: dict[str, Any], *, shared: bool = False) -> Iterator[None]:
        """Make the parent MLflow run, or go on with it; its status tells how the block ended.

        Args:
            options: the study's own settings, to be logged as parameters.
            shared: whether several processes may be at the study, who agree on what each of them trains.

        Raises:
            ConfigError: another process is at the same study.
            TrackingError: the store cannot be used.
        """
        with nullcontext() if shared else self.alone():
            self.ledger = Ledger(self.request, self.base)
            parent = self.ledger.parent
            parent.log_environment()
            parent.log_params({f"study.{name}": str(value) for name, value in options.items()})
            status = "FAILED"
            try:
                yield
                status = "FAILED" if self.failed else "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                parent.end(status)

    @contextmanager
    def alone(self, patience_s: float = 0.0) -> Iterator[None]:
        """Hold the study's folder alone.

        Raises:
            ConfigError: another process has it for longer than one's patience, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=patience_s):
                yield
        except Timeout as error:
            raise ConfigError(
                f"Another process is at the study {self.request.name}: wait for it, or give another --name."
            ) from error
        except OSError as error:
            what = f"{error.filename} cannot be written ({error.strerror})"
            raise ConfigError(f"{what}: give another trainer.logger.save_dir.") from error

    def trainings(self, points: Sequence[Point]) -> list[Training]:
        """The trainings of all points, seed by seed, so that a study that is stopped can compare what is there."""
        first = self.base.seed
        return [Training(point, seed) for seed in range(first, first + self.request.seeds) for point in points]

    def known(self, trainings: Sequence[Training], *, divergence_counts: bool = False) -> list[Child | None]:
        """What became of trainings that need not be made again; None for the others."""
        made = self.ledger.made(divergence_counts=divergence_counts)
        return [Child(each, *made[digest]) if (digest := self.digest(each)) in made else None for each in trainings]

    def digest(self, training: Training) -> str:
        """A short text that is another one for every other training."""
        return self.request.digest(training.overrides)

    def train(
        self,
        trainings: Sequence[Training],
        *,
        divergence_counts: bool = False,
        what: str = "",
        hopeless: Callable[[Training], bool] = lambda _: False,
    ) -> list[Child]:
        """Make the trainings that have not been made yet, and tell of each, and meanwhile of those under way.

        Args:
            trainings: in the order in which they are to be made.
            divergence_counts: whether a training that diverged is a result, and no failure.
            what: said before each line of progress.
            hopeless: is asked before each training, and every second meanwhile, whether it is to be given up.

        Returns:
            What became of each, in the same order.
        """
        known = zip(trainings, self.known(trainings, divergence_counts=divergence_counts), strict=True)
        done = {training: child for training, child in known if child is not None}
        todo = [training for training in trainings if training not in done]
        if done:
            print(f"{what}{len(done)} of {len(trainings)} trainings are known already.", flush=True)
        if not todo:
            return [done[training] for training in trainings]
        meter, before = Meter(f"{what}trainings", len(todo), unit="trainings", announce=False), len(done)

        def look(running: Sequence[Job]) -> None:
            others = f" (and {len(running) - 1} more)" if len(running) > 1 else ""
            said = last_line(running[0].log)
            text = f"{what}{running[0].key.label}{others}" + (f": {said}" if said else "")
            meter.show(len(done) - before, text)

        jobs = [self._job(training) for training in todo]
        for job in jobs:
            if not self._launcher.goes_on(job):
                self.ledger.bury(job.digest)

        def judge(job: Job) -> bool:
            return hopeless(job.key)

        with closing(meter):
            made = make(jobs, self.request.jobs or len(jobs), self._launcher, look, judge)
            for number, ended in enumerate(made, start=1):
                child = self.ledger.outcome(ended, pruned=judge(ended.job))
                done[child.training] = child
                failed = bool(child.error) and not child.pruned and not (divergence_counts and child.diverged)
                other = "pruned" if child.pruned else "diverged" if child.error else self._result(child)
                result = "failed" if failed else other
                line = f"{what}[{number}/{len(todo)}] {child.training.label}: {result} ({ended.seconds:.1f} s)"
                if failed:
                    self.failed.append(child)
                    line += f"\n{ended.last_words()}\n(all of it: {ended.job.log})"
                print(line, flush=True)
        return [done[training] for training in trainings]

    def _job(self, training: Training) -> Job:
        log = self.folder / "logs" / (re.sub(r"[^\w.+-]+", "-", training.label) + ".log")
        digest, workers = self.digest(training), training.point.workers
        words = self._command(training, digest, self.ledger.parent.run_id)
        return Job(training, words, log, workers=workers, digest=digest)

    def _command(self, training: Training, digest: str, parent: str) -> tuple[str, ...]:
        tags = {
            **self.base.tags,
            PARENT: parent,
            STUDY: self.request.name,
            KIND: self.request.kind,
            ROLE: "training",
            POINT: training.point.label,
            SEED: str(training.seed),
            DIGEST: digest,
        }
        tracked = (
            ("trainer.enable_progress_bar", "true"),  # for the study to watch
            ("trainer.logger.run_name", f"{self.request.name}, {training.label}"),
            ("trainer.logger.tags", json.dumps(tags)),
        )
        return self.request.command((*training.overrides, *tracked))

    def _result(self, child: Child) -> str:
        values = self.ledger.history(child, self.base.metric)
        return f"{self.base.metric} {values[max(values)]:.4g}" if values else "finished"


def last_line(log: Path) -> str:
    """The last whole line of a log, so far; nothing of one that is on another machine."""
    if not log.exists():
        return ""
    whole = log.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]  # the rest is still being written
    return whole.rstrip().rpartition("\n")[2]


def _resolve(planned: Mapping[str, tuple[str, ...]]) -> list[Any]:
    """Check trainings in processes of their own, and return their resolved configurations, nested.

    Args:
        planned: the command line of each, by the label of its point.
    """
    with tempfile.TemporaryDirectory(prefix="dmaml-study-", ignore_cleanup_errors=True) as folder:
        jobs = [
            Job(label, words, Path(folder, f"{number}.log"), Path(folder, f"{number}.yaml"))
            for number, (label, words) in enumerate(planned.items())
        ]
        said = f"Still checking the settings of {len(jobs)} trainings ..."
        with told_after(LONG_S, partial(print, said, file=sys.stderr, flush=True)):
            for ended in make(jobs, os.cpu_count() or 1, Local()):
                if ended.code:
                    raise ConfigError(ended.error() + (f" (for {ended.job.key})" if len(planned) > 1 else ""))
        return [yaml.safe_load(job.resolved.read_text(encoding="utf-8")) for job in jobs if job.resolved]

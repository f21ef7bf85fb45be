"""How a module walks a run: H meta-iterations, each a meta-gradient over a meta-batch and a step of the meta-optimizer.

One Lightning training step is one run, so that callbacks, validation and checkpoints fall on the ends of runs;
`global_step` counts meta-iterations.

Legend: T tasks, H meta-iterations of a run.
"""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dmaml_pl.engines.asked import MetaIteration
from dmaml_pl.engines.base import Engine, MetaOutcome, Of
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.modules.evaluating import EvaluatedModule
from dmaml_pl.modules.memory import PeakMemory
from dmaml_pl.modules.metrics import env_steps_of, log_run
from dmaml_pl.modules.outer_step import OuterStep
from dmaml_pl.objectives import Objective
from dmaml_pl.runs import ENV_STEPS, RunClock, RunReport, RunStrategy, strategy_of_runs
from dmaml_pl.tasks import TaskBatch, TaskSource, derive_seed, stack_tasks


@dataclass(slots=True)
class RunUnderWay:
    """How far a run is on this worker; apart from the module, whose attributes take PyTorch a microsecond each to set.

    Attributes:
        iteration: number of the meta-iteration under way within its run.
        tasks: seen so far.
        env_steps: steps in environments made so far.
        latest: what the last meta-iteration gave, by name.
    """

    iteration: int = 0
    tasks: int = 0
    env_steps: int = 0
    latest: dict[str, float | Tensor] = field(default_factory=dict)


class RunModule(EvaluatedModule):
    """The part of `MetaLearning` that trains.

    Attributes:
        gradient_clip: largest norm of the meta-gradient; None leaves it as it is.
        run_length: H, where the strategy does not set it.
        runs_done: runs since the start of the training.
        tasks_seen: tasks that all workers have seen in them.
        under_way: how far the run under way is on this worker.
        memory: what the training takes of it.
    """

    memory: PeakMemory

    gradient_clip: float | None
    run_length: int

    compared_every = 10
    """Only each so-many-th time step of rollouts is looked at, to compare a worker's policy with the merged one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.runs_done = 0
        self.tasks_seen = 0
        self.env_steps = 0
        self.under_way = RunUnderWay()
        self._validated_on: TaskBatch | None = None
        self._before_merge: tuple[Tensor, Any] | None = None

    def on_fit_start(self) -> None:
        """Watch the memory, and without a GPU let PyTorch's optimizers ask for one the quick way.

        They ask at every step. Lightning makes PyTorch ask the driver's library (NVML), lest a fork finds CUDA in use;
        where that library is missing, looking for it took longer than the step.
        """
        self.memory = PeakMemory(self.device)
        if not torch.cuda.is_available():
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

    def training_step(self, tasks: TaskSource, batch_idx: int) -> RunReport:
        """Make one run alone: H times a meta-gradient over a meta-batch and a step of the meta-optimizer.

        Raises:
            NonFiniteError: the loss or a weight is not finite, and there is no other worker to tell first.
        """
        run, clock, trainer = self.runs_done, RunClock(), self.trainer
        limit, seconds = self.limits_of_run()
        strategy = strategy_of_runs(trainer)
        outer, listeners = OuterStep(self, self.gradient_clip), self.listeners("on_meta_iteration_end")
        # Whatever the network draws (dropout) follows from the run, so that a resumed run draws the same.
        torch.manual_seed(derive_seed("run", getattr(tasks, "seed", 0), self.global_rank, run))
        rows: list[dict[str, float | Tensor]] = []
        failure, act, algorithm = None, self.act_of(self.learner), self.algorithm
        way = self.under_way = RunUnderWay()
        worker, device, done = self.global_rank, self.device, trainer.global_step
        with ExitStack() as surroundings:
            while len(rows) < limit and not (rows and clock.seconds() >= seconds):
                self.answer_the_outside(strategy)
                way.iteration = len(rows)
                batch = tasks.sample(worker=worker, run=run, iteration=way.iteration, act=act).to(device)
                algorithm.begin(done + way.iteration)
                if not rows:
                    engine = self.engine.for_training(self.learner, batch)
                    surroundings.enter_context(limited_threads(engine.threads(self.learner, batch)))
                outcome = self._meta_gradient(engine, batch, outer)
                loss = float(outcome.loss)
                rows.append(self._row(loss, outcome, batch, outer))
                failure = None if math.isfinite(loss) else self._not_finite("the query loss", way.iteration)
                if strategy is not None:
                    failure = strategy.share_meta_gradient(self.learner.parameters(), outcome.loss, failure)
                if failure is None:
                    rows[-1] |= self._step(engine, batch, outer, strategy, outcome.loss)
                way.latest = rows[-1]
                way.tasks += batch.tasks
                way.env_steps += int(rows[-1].get(ENV_STEPS, 0))
                if failure is not None:
                    break
                for tell in listeners:
                    tell(trainer, self, len(rows), limit, loss)
        if failure is None and not all(
            bool(torch.isfinite(p).all()) for p in self.learner.parameters() if p.requires_grad
        ):
            failure = self._not_finite("a weight", way.iteration)
        if failure is not None and trainer.world_size == 1:
            raise failure
        report: RunReport = _series(rows, limit) | {
            "tasks": way.tasks,
            "iterations": len(rows),
            "share": 1.0 if math.isinf(seconds) else float(len(rows)),
            "failure": failure,
        }
        self._before_merge = self._outputs_before_merge(batch)
        if failure is None and strategy is not None:
            report |= self.own_validation(strategy.validation_tasks)
        self.runs_done += 1
        self.tasks_seen += way.tasks
        way.tasks = way.env_steps = 0
        report["seconds"], report["cpu_seconds"] = clock.seconds(), clock.cpu_seconds()
        return report

    def _meta_gradient(self, engine: Engine, batch: TaskBatch, outer: OuterStep, of: Of = "loss") -> MetaOutcome:
        outer.zero_grad()
        outcome = engine.meta_gradient(self.learner, batch, outer.backward, of)
        torch.clear_autocast_cache()  # which would keep every task's weights in lower precision until the run ends
        return outcome

    def _evaluate_again(
        self, engine: Engine, batch: TaskBatch, outer: OuterStep, strategy: RunStrategy | None, of: Of = "loss"
    ) -> Tensor:
        """The optimizer's closure, for one that evaluates more than once: at the weights as they are now."""
        outcome = self._meta_gradient(engine, batch, outer, of)
        if strategy is not None:
            # Whoever is not finite is left out, or seen by the weights after the step, which all workers make alike.
            finite = math.isfinite(float(outcome.loss))
            failure = None if finite else self._not_finite("the query loss", self.under_way.iteration)
            strategy.share_meta_gradient(self.learner.parameters(), outcome.loss, failure)
        outer.clip()
        return outcome.loss

    def _outputs_before_merge(self, batch: TaskBatch) -> tuple[Tensor, Any] | None:
        """Inputs (B, ...), and what the network says of them with this worker's own weights, where that is compared."""
        if self.trainer.world_size == 1 or type(self.objective).between is Objective.between:
            return None
        x = batch.query.x[:, :, :: self.compared_every].flatten(0, 2)
        with torch.no_grad():
            return x, self.learner.network(x)

    def _compare_with_merged(self, report: RunReport) -> None:
        """Tell how far the workers' own outputs are from those of the merged weights, on average: `merge/kl`."""
        strategy, known, self._before_merge = strategy_of_runs(self.trainer), self._before_merge, None
        if strategy is None or known is None:
            return
        x, before = known
        with torch.no_grad():
            away = self.objective.between(before, self.learner.network(x))
        everyone = torch.tensor(strategy.gather(None if away is None else float(away)))
        report.setdefault("merge", {})["merge/kl"] = float(everyone.mean())

    def _row(self, loss: float, outcome: MetaOutcome, batch: TaskBatch, outer: OuterStep) -> dict[str, float | Tensor]:
        """What is told of a meta-iteration, by name; the names are the same on every worker, also on one that fails."""
        row: dict[str, float | Tensor] = {"loss": loss}
        if not self.objective.shows_its_loss:
            row[self.objective.metric] = outcome.metric
        if batch.metrics is not None:
            row |= batch.metrics
        if outer.asking is not None:
            row |= dict.fromkeys(outer.asking.metric_names, math.nan)
        return row

    def _step(
        self, engine: Engine, batch: TaskBatch, outer: OuterStep, strategy: RunStrategy | None, loss: Tensor
    ) -> dict[str, float]:
        """Step the meta-optimizer, whose gradients and their `loss` are there; returns what it tells of the step."""
        outer.clip()
        asking = outer.asking
        if asking is not None:
            share = partial(_shared, strategy)
            asking.problem = MetaIteration(self.learner, engine, batch, asking.parameters(), share)
        outer.step(loss, partial(self._evaluate_again, engine, batch, outer, strategy))
        return {} if asking is None else asking.metrics

    def own_validation(self, tasks: int) -> RunReport:
        """The validation loss of this worker's own weights, on tasks that `val/...` is not measured on.

        Raises:
            ConfigError: there is no data module to sample them from.
        """
        if not tasks:
            return {}
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "evaluation_task"):
            raise ConfigError(
                "trainer.strategy.merge weighs the workers by validation tasks, for which training needs a data module "
                "of data_modules: choose another merge, such as dmaml_pl.MeanMerge."
            )
        if self._validated_on is None:
            sampled = [data.evaluation_task("val", data.val_tasks + number) for number in range(tasks)]
            self._validated_on = stack_tasks(sampled).to(self.device)
        with self._adapting(self._validated_on) as batch:
            engine = self.engine.for_evaluation(self.learner, batch)
            curve = engine.adaptation_curve(self.learner, batch, self.algorithm.steps)
        return {"validation_loss": float(curve.loss[:, -1].mean())}

    def planned_run_length(self) -> float:
        """H: the strategy's, where it sets one, else the module's; infinite where a run ends after a time."""
        strategy = strategy_of_runs(self.trainer)
        if strategy is None:
            return self.run_length
        if strategy.run_seconds is not None:
            return math.inf
        return self.run_length if strategy.run_length is None else strategy.run_length

    def limits_of_run(self) -> tuple[float, float]:
        """Meta-iterations and seconds that this run may take; the last one is cut short where `max_steps` is in it."""
        length, steps = self.planned_run_length(), self.trainer.max_steps
        if steps >= 0:
            length = min(length, steps - self.trainer.global_step)
        strategy = strategy_of_runs(self.trainer)
        seconds = None if strategy is None else strategy.run_seconds
        return length, math.inf if seconds is None else seconds

    def _not_finite(self, what: str, iteration: int) -> NonFiniteError:
        return NonFiniteError(what, worker=self.global_rank, run=self.runs_done, iteration=iteration)

    def listeners(self, hook: str) -> list[Callable[..., object]]:
        """The callbacks' own methods of that name."""
        found = (getattr(callback, hook, None) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [method for method in found if method is not None]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the run that has just been merged, if one has, then tell callbacks with an `on_run_end`."""
        self.log("train/loss", outputs["loss"], logger=False)
        if "end" not in outputs:  # else the weights of this run are not merged yet
            self._compare_with_merged(outputs)
        if "series" in outputs:
            self._log_run(outputs)
        if "series" not in outputs or "end" in outputs:  # the run that has just ended is not merged yet
            return
        for tell in self.listeners("on_run_end"):
            tell(self.trainer, self, outputs)

    def log_merged_run(self, report: RunReport) -> None:
        """Log a run whose merge the strategy has finished after the run's own end."""
        self._log_run(report)

    def _log_run(self, report: RunReport) -> None:
        self.env_steps += env_steps_of(report)
        log_run(self, report)


def _series(rows: list[dict[str, float | Tensor]], limit: float) -> RunReport:
    """What each meta-iteration gave, of equal length on every worker, also on one that has failed."""
    series = {name: torch.tensor([float(row[name]) for row in rows]) for name in rows[0]}
    if math.isfinite(limit):
        series = {name: functional.pad(own, (0, int(limit) - len(own)), value=math.nan) for name, own in series.items()}
    return {"loss": series["loss"].mean(), "series": series}


def _shared(strategy: RunStrategy | None, values: Tensor) -> Tensor:
    """The mean over the workers that make every step together; this worker's own where each makes its run alone."""
    if strategy is not None:
        strategy.share_meta_gradient((), values, None)
    return values

"""The LightningModule of supervised few-shot learning: walks runs, validates, and meta-tests.

One Lightning training step is one run of H meta-iterations, so that callbacks, validation and checkpoints fall on the
ends of runs. `global_step` counts meta-iterations.

Legend: T tasks, H meta-iterations of a run, I adaptation steps, N evaluated tasks.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn import functional

from dmaml_pl.algorithms.base import Algorithm
from dmaml_pl.checks import require_positive
from dmaml_pl.engines import AdaptationCurve, Engine, EngineName, engine_named
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.evaluation.baseline import Baseline
from dmaml_pl.evaluation.curves import BASELINE, NETWORKS, TRAINED, UNTRAINED, MetaTest, TaskScores, in_order
from dmaml_pl.modules.metrics import log_evaluation, log_run
from dmaml_pl.modules.outer_step import MetaStep
from dmaml_pl.networks.batch_norm import use_batch_statistics
from dmaml_pl.objectives import ObjectiveName, objective_named
from dmaml_pl.runs import CHECKPOINT_KEY, RunClock, RunReport, RunStrategy, strategy_of_runs
from dmaml_pl.tasks import Scaling, TaskBatch, TaskSource, check_tasks, derive_seed, stack_tasks


class FewShotModule(pl.LightningModule):
    """Meta-learns a network by any algorithm of `dmaml_pl.algorithms`.

    Args:
        network: from samples (B, ...) to predictions (B, D) or logits (B, N).
        algorithm: the inner loop.
        objective: "regression" or "classification".
        evaluation_steps: adaptation steps up to which validation and test judge; at least those of training are made.
        meta_optimizer: from parameters to the meta-optimizer.
        meta_schedule: from the meta-optimizer to a learning-rate schedule, stepped once a meta-iteration.
        gradient_clip: largest norm of the meta-gradient; None leaves it as it is.
        run_length: H, meta-iterations of a run where the strategy does not set it.
        engine: "learn2learn" adapts to one task after another, "per_task" as well, on all threads and faster for
            convolutions on CPUs, "vectorized" to all of a meta-batch at once; "auto" takes the fastest one that can run
            the network where it is.
        compile: compile the meta-gradient of the vectorized engine. Takes a while once, and pays in long trainings of
            small networks. What the network decides in Python is decided at the first meta-iteration.
        task_chunk: tasks that are in memory at a time, at most; the meta-gradients of chunks are added up. By default
            all where they are executed at once, and as many as there are threads where one after another.

    Attributes:
        shapes: axes of one "sample" and of one "output" of the network, as the data gave them; empty before.
        scaling: how the units of the data became those of its tasks, if they are not the same.
        meta_test: what the last meta-test found.
        baseline: a network trained without meta-learning for the meta-test to compare with; `MetaTestReport` sets it.
        trained_by: the number of workers that made the checkpoint loaded last.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        algorithm: Algorithm,
        objective: ObjectiveName = "regression",
        evaluation_steps: int = 10,
        meta_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        meta_schedule: LRSchedulerCallable | None = None,
        gradient_clip: float | None = None,
        run_length: int = 100,
        engine: EngineName = "auto",
        compile: bool = False,  # noqa: A002 - the name of the setting
        task_chunk: int | None = None,
    ) -> None:
        super().__init__()
        require_positive(**{"model.run_length": run_length, "model.evaluation_steps": evaluation_steps})
        if gradient_clip is not None:
            require_positive(**{"model.gradient_clip": gradient_clip})
        self.automatic_optimization = False
        self.algorithm = algorithm
        self.objective = objective_named(objective)
        self.engine = engine_named(engine, algorithm, self.objective, compiled=compile, task_chunk=task_chunk)
        self.evaluation_steps = max(evaluation_steps, algorithm.steps)
        self.meta_optimizer = meta_optimizer
        self.meta_schedule = meta_schedule
        self.gradient_clip = gradient_clip
        self.run_length = run_length
        use_batch_statistics(network)
        self.learner: Any = algorithm.wrap(network)
        self.runs_done = 0
        self.tasks_seen = 0
        self.tasks_under_way = 0
        self.iteration = 0
        self.meta_test: MetaTest | None = None
        self.baseline: Baseline | None = None
        self.trained_by: int | None = None
        self._untrained: tuple[Any, ...] = ()
        self._scores: list[TaskScores] = []
        self._loaded_step: int | None = None
        self._judged_on: TaskBatch | None = None
        self.shapes: dict[str, list[int]] = {}
        self.scaling: Scaling | None = None

    @property
    def network(self) -> nn.Module:
        """The network that is meta-learned, with the meta-weights."""
        network: nn.Module = self.learner.module
        return network

    @property
    def untrained(self) -> Any:
        """The learner with the weights before training, from the start of any trainer function on."""
        return self._untrained[0].to(self.device)

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that `model.engine` comes to."""
        return self.engine.name(self.learner)

    def configure_optimizers(self) -> Any:
        """The meta-optimizer over all meta-learned parameters, and its schedule.

        Raises:
            ConfigError: a setting that the optimizer refuses, or a learning rate that is not greater than zero.
        """
        try:
            optimizer = self.meta_optimizer(self.learner.parameters())
        except ValueError as error:
            raise ConfigError(f"model.meta_optimizer refuses a setting: {str(error).rstrip('.')}.") from error
        for group in optimizer.param_groups:
            require_positive(**{"model.meta_optimizer.lr": float(group["lr"])})
        if self.meta_schedule is None:
            return optimizer
        return [optimizer], [self.meta_schedule(optimizer)]

    def forward(self, x: Tensor) -> Any:
        """The unadapted network's predictions (B, ...) of samples (B, ...)."""
        return self.network(x)

    # -- before anything runs --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before it costs time, and remember the untrained weights for the meta-test.

        Raises:
            ConfigError: network, objective and data do not fit together, or the strategy cannot merge runs.
        """
        trainer = self.trainer
        self.check_workers_can_merge(trainer)
        task = getattr(getattr(trainer, "datamodule", None), "evaluation_task", None)
        self.scaling = getattr(getattr(trainer, "datamodule", None), "scaling", None) or self.scaling
        if task is not None:
            self.check_task(task("val" if stage == "fit" else "test", 0))
        if not self._untrained:
            if trainer.world_size > 1:
                self.learner.load_state_dict(trainer.strategy.broadcast(self.learner.state_dict()))
            self._untrained = (copy.deepcopy(self.learner),)

    def check_workers_can_merge(self, trainer: pl.Trainer) -> None:
        """Check that several workers have a strategy that knows about runs; Lightning's DDP would let them drift apart.

        Raises:
            ConfigError: names `trainer.strategy`.
        """
        if trainer.num_devices * trainer.num_nodes > 1 and strategy_of_runs(trainer) is None:
            raise ConfigError(
                f"trainer.strategy is {type(trainer.strategy).__name__}, which does not know about runs: with more "
                "than one worker it must be dmaml."
            )

    def check_task(self, task: TaskBatch) -> None:
        """Check that the network can take a task (no T axis) and that the objective can judge what it gives.

        Raises:
            ConfigError: names the settings that do not fit together.
        """
        batch = task.map(lambda tensor: tensor.unsqueeze(0))
        check_tasks(batch)
        try:
            with torch.no_grad():
                prediction = self.network(task.support_x.to(self.device))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model.network cannot take samples of shape {tuple(task.support_x.shape[1:])} ({reason}): set its "
                "input size to that of the data."
            ) from error
        self.objective.check(prediction, task.support_y.to(self.device))
        self.shapes = {"sample": list(task.support_x.shape[1:]), "output": list(prediction.shape[1:])}
        self.engine.check(self.learner, batch.to(self.device))

    # -- a run -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Without a GPU, let PyTorch's optimizers ask for one the quick way.

        They ask at every step. Lightning makes PyTorch ask the driver's library (NVML), lest a fork finds CUDA in use;
        where that library is missing, looking for it took longer than the step.
        """
        if not torch.cuda.is_available():
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

    def training_step(self, tasks: TaskSource, batch_idx: int) -> RunReport:
        """Make one run alone: H times a meta-gradient over a meta-batch and a step of the meta-optimizer.

        Raises:
            NonFiniteError: the loss or a weight is not finite, and there is no other worker to tell first.
        """
        run, clock = self.runs_done, RunClock()
        limit, seconds = self._limits_of_run()
        strategy = strategy_of_runs(self.trainer)
        meta_step, listeners = MetaStep(self, self.gradient_clip), self._listeners("on_meta_iteration_end")
        # Whatever the network draws (dropout) follows from the run, so that a resumed run draws the same.
        torch.manual_seed(derive_seed("run", getattr(tasks, "seed", 0), self.global_rank, run))
        losses: list[float] = []
        metrics: list[Tensor] = []
        failure, seen = None, 0
        worker, device = self.global_rank, self.device
        with ExitStack() as surroundings:
            while len(losses) < limit and not (losses and clock.seconds() >= seconds):
                self.answer_the_outside(strategy)
                self.iteration = len(losses)
                batch = tasks.sample(worker=worker, run=run, iteration=self.iteration).to(device)
                if not losses:
                    surroundings.enter_context(limited_threads(self.engine.threads(self.learner, batch)))
                loss, metric, failure = self._meta_iteration(batch, meta_step, strategy)
                losses.append(loss)
                metrics.append(metric)
                seen += batch.tasks
                self.tasks_under_way = seen
                if failure is not None:
                    break
                for tell in listeners:
                    tell(self.trainer, self, len(losses), limit, loss)
        if failure is None and not all(bool(torch.isfinite(p).all()) for p in self.learner.parameters()):
            failure = self._not_finite("a weight", self.iteration)
        if failure is not None and self.trainer.world_size == 1:
            raise failure
        series = {"loss": torch.tensor(losses)}
        if self.objective.better == "max":
            series[self.objective.metric] = torch.stack(metrics).float().cpu()
        if math.isfinite(limit):  # of equal length on every worker, also on one that has failed
            series = {
                name: functional.pad(own, (0, int(limit) - len(own)), value=math.nan) for name, own in series.items()
            }
        report: RunReport = {
            "loss": series["loss"].mean(),
            "series": series,
            "tasks": seen,
            "iterations": len(losses),
            "share": 1.0 if math.isinf(seconds) else float(len(losses)),
            "failure": failure,
        }
        if failure is None and strategy is not None:
            report |= self._own_validation(strategy.validation_tasks)
        self.runs_done += 1
        self.tasks_seen += seen
        self.tasks_under_way = 0
        report["seconds"], report["cpu_seconds"] = clock.seconds(), clock.cpu_seconds()
        return report

    def _own_validation(self, tasks: int) -> RunReport:
        """The validation loss of this worker's own weights, on tasks that `val/...` is not measured on.

        Raises:
            ConfigError: there is no data module to draw them from.
        """
        if not tasks:
            return {}
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "evaluation_task"):
            raise ConfigError(
                "trainer.strategy.merge weighs the workers by validation tasks, for which training needs a data module "
                "of data_modules: choose another merge, such as dmaml_pl.MeanMerge."
            )
        if self._judged_on is None:
            drawn = [data.evaluation_task("val", data.val_tasks + number) for number in range(tasks)]
            self._judged_on = stack_tasks(drawn).to(self.device)
        with self._adapting(self._judged_on) as batch:
            curve = self.engine.adaptation_curve(self.learner, batch, self.algorithm.steps)
        return {"validation_loss": float(curve.loss[:, -1].mean())}

    def answer_the_outside(self, strategy: RunStrategy | None) -> None:
        """Called often in long work, so that a signal, or a worker's death, soon ends it.

        Raises:
            SIGTERMException: this process was asked to end.
            WorkerLostError: a worker was lost.
        """
        if self.trainer.received_sigterm:
            raise SIGTERMException
        if strategy is not None:
            strategy.check_workers()

    def planned_run_length(self) -> float:
        """H: the strategy's, where it sets one, else the module's; infinite where a run ends after a time."""
        strategy = strategy_of_runs(self.trainer)
        if strategy is None:
            return self.run_length
        if strategy.run_seconds is not None:
            return math.inf
        return self.run_length if strategy.run_length is None else strategy.run_length

    def _limits_of_run(self) -> tuple[float, float]:
        """Meta-iterations and seconds that this run may take; the last one is cut short where `max_steps` is in it."""
        length, steps = self.planned_run_length(), self.trainer.max_steps
        if steps >= 0:
            length = min(length, steps - self.trainer.global_step)
        strategy = strategy_of_runs(self.trainer)
        seconds = None if strategy is None else strategy.run_seconds
        return length, math.inf if seconds is None else seconds

    def _meta_iteration(
        self, batch: TaskBatch, meta_step: MetaStep, strategy: RunStrategy | None
    ) -> tuple[float, Tensor, NonFiniteError | None]:
        meta_step.zero_grad()
        outcome = self.engine.meta_gradient(self.learner, batch, meta_step.backward)
        torch.clear_autocast_cache()  # which would keep every task's weights in lower precision until the run ends
        loss = float(outcome.loss)
        failure = None if math.isfinite(loss) else self._not_finite("the query loss", self.iteration)
        if strategy is not None:
            failure = strategy.share_meta_gradient(self.learner.parameters(), failure)
        if failure is None:
            meta_step.step()
        return loss, outcome.metric, failure

    def _not_finite(self, what: str, iteration: int) -> NonFiniteError:
        return NonFiniteError(what, worker=self.global_rank, run=self.runs_done, iteration=iteration)

    def _listeners(self, hook: str) -> list[Callable[..., object]]:
        """The callbacks' own methods of that name."""
        found = (getattr(callback, hook, None) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [method for method in found if method is not None]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the run that has just been merged, if one has, then tell callbacks with an `on_run_end`."""
        self.log("train/loss", outputs["loss"], logger=False)
        if "series" in outputs:
            log_run(self, outputs)
        if "series" not in outputs or "end" in outputs:  # the run that has just ended is not merged yet
            return
        for tell in self._listeners("on_run_end"):
            tell(self.trainer, self, outputs)

    def log_merged_run(self, report: RunReport) -> None:
        """Log a run whose merge the strategy has finished after the run's own end."""
        log_run(self, report)

    # -- validation, test, prediction ------------------------------------------------------------------------------

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to a share of the validation tasks."""
        self.answer_the_outside(strategy_of_runs(self.trainer))
        self._scores.append(self._score(self.learner, batch))

    def on_validation_epoch_end(self) -> None:
        """Join the workers' shares; log the metric after each adaptation step as `val/...`."""
        scores = self._gather()
        if not self.trainer.sanity_checking:
            log_evaluation(self, "val", scores)

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to a share of the meta-test tasks: the trained, the untrained, and the baseline network."""
        self._scores.append(self._score(self.learner, batch))
        self._scores.append(self._score(self.untrained, batch)._replace(network=UNTRAINED))
        if self.baseline is not None:
            scores = self._score(self.baseline.learner, batch, self.baseline.engine)
            self._scores.append(scores._replace(network=BASELINE))

    def on_test_epoch_end(self) -> None:
        """Join the workers' shares into `meta_test`; log them as `test/...`."""
        scores = self._gather()
        for network in NETWORKS:
            own = [item for item in scores if item.network == network]
            if own:
                log_evaluation(self, "test", own, "" if network == TRAINED else f"{network}_")
        self.meta_test = MetaTest.from_scores(self.objective, scores, self.algorithm.steps)

    def predict_step(self, batch: TaskBatch, batch_idx: int = 0) -> Tensor:
        """Query predictions of each task before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        with self._adapting(batch) as tasks:
            return self.engine.predict(self.learner, tasks, self.evaluation_steps)

    def predictions_from(self, batch: TaskBatch, *, untrained: bool = False, baseline: bool = False) -> Tensor:
        """As `predict_step`, if asked for by the untrained or the baseline network; `batch` is on any device."""
        learner, engine = self.learner, self.engine
        if baseline and self.baseline is not None:
            learner, engine = self.baseline.learner, self.baseline.engine
        elif untrained:
            learner = self.untrained
        with self._adapting(batch.to(self.device)) as tasks:
            return engine.predict(learner, tasks, self.evaluation_steps)

    def _score(self, learner: Any, batch: TaskBatch, engine: Engine | None = None) -> TaskScores:
        judge = self.engine if engine is None else engine
        with self._adapting(batch) as tasks:
            curve: AdaptationCurve = judge.adaptation_curve(learner, tasks, self.evaluation_steps)
        numbers = torch.arange(batch.tasks) if batch.numbers is None else batch.numbers
        return TaskScores(numbers.cpu(), curve.loss.cpu(), curve.metric.cpu())

    def judged_so_far(self) -> float | None:
        """Mean metric, after as many steps as in training, of the tasks that this worker has judged; None before."""
        own = [item.metric[:, self.algorithm.steps] for item in self._scores if item.network == TRAINED]
        return float(torch.cat(own).mean()) if own else None

    def _gather(self) -> list[TaskScores]:
        strategy, own = strategy_of_runs(self.trainer), self._scores
        self._scores = []
        return in_order([own] if strategy is None else strategy.gather(own))

    @contextmanager
    def _adapting(self, batch: TaskBatch) -> Iterator[TaskBatch]:
        """Gradients on inside Lightning's `inference_mode`; tensors made inside it must be copied to be trained on."""
        with torch.inference_mode(False), torch.enable_grad():
            yield batch.map(Tensor.clone)
        torch.clear_autocast_cache()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of the next run, from which its tasks follow, and what the network was trained on."""
        checkpoint["runs"] = {"done": self.runs_done, "tasks_seen": self.tasks_seen}
        checkpoint["shapes"] = self.shapes
        checkpoint["scaling"] = None if self.scaling is None else self.scaling._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the run after the last one that was merged."""
        runs = checkpoint.get("runs", {})
        self.runs_done = int(runs.get("done", 0))
        self.tasks_seen = int(runs.get("tasks_seen", 0))
        self._loaded_step = int(checkpoint.get("global_step", 0))
        self.trained_by = checkpoint.get(CHECKPOINT_KEY, {}).get("workers")
        self.shapes = self.shapes or checkpoint.get("shapes", {})

    @property
    def meta_iterations(self) -> int:
        """Meta-iterations behind the present weights: of the training under way, else of the checkpoint loaded last."""
        if self.trainer.state.fn == "fit" or self._loaded_step is None:
            return self.trainer.global_step
        return self._loaded_step

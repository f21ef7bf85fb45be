"""How a module evaluates: validation, meta-test and prediction.

Legend: T tasks, Q query samples, I adaptation steps.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from dmaml_pl.algorithms.base import Algorithm
from dmaml_pl.engines import EngineChoice
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.evaluation.baseline import Baseline
from dmaml_pl.evaluation.curves import (
    BASELINE,
    NETWORKS,
    ORACLE,
    TRAINED,
    UNTRAINED,
    MetaTest,
    TaskScores,
    Validation,
    in_order,
)
from dmaml_pl.learner import MetaLearner
from dmaml_pl.modules.metrics import log_evaluation
from dmaml_pl.objectives import Objective
from dmaml_pl.runs import RunStrategy, strategy_of_runs
from dmaml_pl.tasks import Act, ActingTasks, Samples, TaskBatch


@dataclass(frozen=True)
class _Acting:
    """How the networks of a learner act (`Act`); a signal is heard whenever they are asked."""

    learner: MetaLearner
    engine: EngineChoice
    steps: int
    device: torch.device
    hears: Callable[[], None]

    def __call__(self, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        policy = self.engine.for_acting(self.learner).act(self.learner, supports)

        def outputs(x: Tensor) -> Any:
            self.hears()
            return policy(x)

        return outputs


class EvaluatedModule(pl.LightningModule):
    """The part of `MetaLearning` that evaluates.

    Attributes:
        learner: network and algorithm.
        engine: chooses what executes them.
        objective: the losses and the metric.
        evaluation_steps: I, adaptation steps up to which tasks are evaluated.
        meta_test: what the last meta-test found.
        baseline: a network trained without meta-learning for the meta-test to compare with; `MetaTestReport` sets it.
        env_steps: steps in environments that all workers have made in training; none in supervised learning.
        validations: what the validations of the training found in environments, from its beginning on.
    """

    learner: MetaLearner
    engine: EngineChoice
    objective: Objective
    evaluation_steps: int
    env_steps: int

    def __init__(self) -> None:
        super().__init__()
        self.validations: list[Validation] = []
        self.meta_test: MetaTest | None = None
        self.baseline: Baseline | None = None
        self._untrained: tuple[MetaLearner, ...] = ()
        self._scores: list[TaskScores] = []
        self._loaded_step: int | None = None

    @property
    def algorithm(self) -> Algorithm:
        """The inner loop."""
        return self.learner.algorithm

    @property
    def untrained(self) -> MetaLearner:
        """The learner with the weights before training, from the start of any trainer function on."""
        return self._untrained[0].to(self.device)

    @property
    def meta_iterations(self) -> int:
        """Meta-iterations behind the present weights: of the training under way, else of the checkpoint loaded last."""
        if self.trainer.state.fn == "fit" or self._loaded_step is None:
            return self.trainer.global_step
        return self._loaded_step

    def remember_untrained(self) -> None:
        """Keep the weights as they are, worker 0's, for the meta-test; once."""
        if not self._untrained:
            if self.trainer.world_size > 1:
                self.learner.load_state_dict(self.trainer.strategy.broadcast(self.learner.state_dict()))
            self._untrained = (copy.deepcopy(self.learner),)

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

    def validation_step(self, batch: TaskBatch | ActingTasks, batch_idx: int) -> None:
        """Adapt to a share of the validation tasks."""
        self.answer_the_outside(strategy_of_runs(self.trainer))
        self._scores.append(self._score(self.learner, batch))

    def on_validation_epoch_end(self) -> None:
        """Join the workers' shares; log the metric after each adaptation step as `val/...`."""
        scores = self._gather("val", self.validation_step)
        if self.trainer.sanity_checking:
            return
        log_evaluation(self, "val", scores)
        if self.env_steps and self.trainer.state.fn == "fit":
            self.validations.append(Validation.of(self.env_steps, scores))

    def test_step(self, batch: TaskBatch | ActingTasks, batch_idx: int) -> None:
        """Adapt to a share of the meta-test tasks: the trained, the untrained, and the baseline network."""
        self._scores.append(self._score(self.learner, batch))
        self._scores.append(self._score(self.untrained, batch)._replace(network=UNTRAINED))
        if self.baseline is not None:
            scores = self._score(self.baseline.learner, batch, self.baseline.engine)
            self._scores.append(scores._replace(network=BASELINE))
        if isinstance(batch, ActingTasks) and (best := batch.best_returns()) is not None:
            returns = best.unsqueeze(1).expand(-1, self.evaluation_steps + 1)
            self._scores.append(TaskScores(batch.numbers.cpu(), -returns, returns, ORACLE))

    def on_test_epoch_end(self) -> None:
        """Join the workers' shares into `meta_test`; log them as `test/...`."""
        scores = self._gather("test", self.test_step)
        for network in NETWORKS:
            own = [item for item in scores if item.network == network]
            if own:
                log_evaluation(self, "test", own, "" if network == TRAINED else f"{network}_")
        self.meta_test = MetaTest.from_scores(self.objective, scores, self.algorithm.steps)

    def predict_step(self, batch: TaskBatch, batch_idx: int = 0) -> Tensor:
        """Query predictions of each task before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        return self._predict(self.learner, batch, self.engine)

    def predictions_from(self, batch: TaskBatch, *, untrained: bool = False, baseline: bool = False) -> Tensor:
        """As `predict_step`, if asked for by the untrained or the baseline network; `batch` is on any device."""
        batch = batch.to(self.device)
        if baseline and self.baseline is not None:
            return self._predict(self.baseline.learner, batch, self.baseline.engine)
        return self._predict(self.untrained if untrained else self.learner, batch, self.engine)

    def _predict(self, learner: MetaLearner, batch: TaskBatch, engine: EngineChoice) -> Tensor:
        with self._adapting(batch) as tasks:
            chosen = engine.for_evaluation(learner, tasks)
            with limited_threads(chosen.threads(learner, tasks)):
                return chosen.predict(learner, tasks, self.evaluation_steps)

    def rollouts_from(self, tasks: ActingTasks) -> list[Any]:
        """Rollouts of the policy in tasks after 0 .. I steps of adaptation; other workers may be gone."""
        act = _Acting(self.learner, self.engine, self.evaluation_steps, self.device, lambda: None)
        with torch.inference_mode(False), limited_threads(1):
            return tasks.rollouts(act)

    def film_from(self, tasks: ActingTasks, place: int) -> Any:
        """Pictures of the policy adapted to one of the tasks, over an episode; None where none are drawn."""
        act = _Acting(self.learner, self.engine, self.evaluation_steps, self.device, lambda: None)
        with torch.inference_mode(False), limited_threads(1):
            return tasks.film(act, place)

    def act_of(self, learner: MetaLearner, steps: int | None = None, engine: EngineChoice | None = None) -> Act:
        """How a learner's networks act when they are adapted to support sets, one a step; what sources are given.

        Args:
            learner: network and algorithm.
            steps: of adaptation; by default as many as in training.
            engine: if other than this module's.
        """
        choice, steps = self.engine if engine is None else engine, learner.algorithm.steps if steps is None else steps
        strategy = None if self._trainer is None else strategy_of_runs(self._trainer)
        return _Acting(learner, choice, steps, self.device, partial(self._hear, strategy))

    def _hear(self, strategy: RunStrategy | None) -> None:
        if self._trainer is not None:
            self.answer_the_outside(strategy)

    def _score(
        self, learner: MetaLearner, batch: TaskBatch | ActingTasks, engine: EngineChoice | None = None
    ) -> TaskScores:
        choice = self.engine if engine is None else engine
        if isinstance(batch, ActingTasks):
            with torch.inference_mode(False), limited_threads(1):
                returns = batch.returns(self.act_of(learner, self.evaluation_steps, choice)).cpu()
            return TaskScores(batch.numbers.cpu(), -returns, returns)
        with self._adapting(batch) as tasks:
            chosen = choice.for_evaluation(learner, tasks)
            with limited_threads(chosen.threads(learner, tasks)):
                curve = chosen.adaptation_curve(learner, tasks, self.evaluation_steps)
        numbers = torch.arange(batch.tasks) if batch.numbers is None else batch.numbers
        return TaskScores(numbers.cpu(), curve.loss.cpu(), curve.metric.cpu())

    def metric_so_far(self) -> float | None:
        """Mean metric, after as many steps as in training, of the tasks that this worker has evaluated; None before."""
        own = [item.metric[:, self.algorithm.steps] for item in self._scores if item.network == TRAINED]
        return float(torch.cat(own).mean()) if own else None

    def _gather(self, split: str, step: Callable[[Any, int], None]) -> list[TaskScores]:
        """The scores of all workers; the tasks of those that were lost meanwhile are evaluated by the others."""
        strategy = strategy_of_runs(self.trainer)
        data: Any = getattr(self.trainer, "datamodule", None)
        everyone: list[list[TaskScores]] = []
        while True:
            own, self._scores = self._scores, []
            if strategy is None:
                return in_order([own])
            everyone += strategy.gather(own)
            missing = self._missing(split, everyone) if strategy.workers_may_change else []
            if not missing:
                return in_order(everyone)
            for number in missing[self.trainer.global_rank :: self.trainer.world_size]:
                step(data.evaluation_tasks(split, [number]).to(self.device), 0)

    def _missing(self, split: str, everyone: list[list[TaskScores]]) -> list[int]:
        """Tasks of which no worker tells."""
        trainer: Any = self.trainer
        limit = {"val": trainer.limit_val_batches, "test": trainer.limit_test_batches}[split]
        if limit != 1.0 or trainer.sanity_checking:
            return []
        known = {int(number) for own in everyone for scores in own for number in scores.numbers}
        return sorted(set(range(getattr(trainer.datamodule, f"{split}_tasks"))) - known)

    @contextmanager
    def _adapting(self, batch: TaskBatch) -> Iterator[TaskBatch]:
        """Gradients on inside Lightning's `inference_mode`; tensors made inside it must be copied to be trained on."""
        with torch.inference_mode(False), torch.enable_grad():
            yield batch.map(Tensor.clone)
        torch.clear_autocast_cache()

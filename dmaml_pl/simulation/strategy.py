"""Simulated workers: the runs and merges of W workers in one process, at once.

Legend: W workers, T tasks of each, H meta-iterations of a run, P values of the meta-weights that are learned, Z of one
worker's optimizer moments.
"""

import copy
import math
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from dmaml_pl.checks import require_counts, require_one_of
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.modules.outer_step import OuterStep
from dmaml_pl.optimizers import AskingOptimizer
from dmaml_pl.runs import RunClock, RunReport
from dmaml_pl.simulation.stacked import StackedWeights, check_gradients, check_steps
from dmaml_pl.strategies.dmaml import DMAMLStrategy, spread
from dmaml_pl.strategies.exchange import METRICS
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.moments import moments_of
from dmaml_pl.tasks import ActingSource, TaskBatch

Averages = Literal["weights", "gradients"]

_FOR = "for simulated workers"

AT_ONCE = 64
"""Tasks that are computed at once: small convolutions of more take longer each, in memory; sinusoid little less."""


class SimulatedStrategy(DMAMLStrategy):
    """Trains as `workers` processes would, in one: with the same seeds, tasks, steps, merges and moments.

    What comes out is what `DMAMLStrategy` gives with so many processes, but for rounding, and for what a network draws
    at random (dropout), which is other numbers. Meta-gradients are those of the vectorized engine. `train/run_seconds`
    is what the simulation took.

    Args:
        workers: W.
        averages: "weights" at the end of each run, by the merge rule; or "gradients" at every meta-iteration, as
            `TaskParallelStrategy` does, where merge rule and moments have nothing to do.
        settings: those of `DMAMLStrategy`, but for what depends on time or on real messages.

    Raises:
        ConfigError: a setting out of its range, or one that cannot be simulated.

    Examples:
        >>> SimulatedStrategy(workers=64, run_length=10).workers
        64
    """

    strategy_name = "simulated"

    def __init__(self, workers: int = 4, averages: Averages = "weights", **settings: Any) -> None:
        super().__init__(**settings)
        require_counts(**{"trainer.strategy.workers": workers})
        require_one_of("trainer.strategy.averages", averages, ("weights", "gradients"))
        for name, value, must in (
            ("run_seconds", self.run_seconds, None),
            ("transfer_dtype", settings.get("transfer_dtype", "float32"), "float32"),
            ("overlap", self.overlap, False),
            ("on_non_finite", self.on_non_finite, "stop"),
            ("elastic", self.elastic, False),
        ):
            if value != must:
                be = "null" if must is None else str(must).lower()
                raise ConfigError(f"trainer.strategy.{name} is {str(value).lower()}, but must be {be} {_FOR}.")
        self.workers = workers
        self.averages = averages

    def check(self, trainer: Any, module: Any, data: Any) -> None:
        """Refuse what cannot be simulated.

        Raises:
            ConfigError: names the setting.
        """
        devices = trainer.num_devices * trainer.num_nodes
        if devices != 1:
            raise ConfigError(f"trainer.devices is {devices}, but must be 1 {_FOR}, who are all in one process.")
        if trainer.precision != "32-true":
            raise ConfigError(f"trainer.precision is {trainer.precision}, but must be 32-true {_FOR}.")
        if isinstance(data, ActingSource):
            raise ConfigError(
                f"data is {type(data).__name__}, whose tasks are acted in, but must be tasks of samples {_FOR}."
            )
        if module.engine.asked not in ("auto", "vectorized"):
            raise ConfigError(f"model.engine is {module.engine.asked}, but must be auto or vectorized {_FOR}.")
        optimizer = module.meta_optimizer(module.learner.param_groups())
        if isinstance(optimizer, AskingOptimizer):
            raise ConfigError(
                f"model.meta_optimizer is {type(optimizer).__name__}, which asks for more than gradients: take another "
                f"{_FOR}, such as torch.optim.Adam."
            )
        check_steps(module.meta_optimizer, type(optimizer).__name__)
        self._check_rule()
        engine, batch = VectorizedEngine(module.objective), data.evaluation_task("train", 0)
        batch = batch.map(lambda tensor: tensor.unsqueeze(0))
        refusal = engine.refusal(module.learner, batch)
        if refusal is not None:
            raise ConfigError(f"model.network cannot be that of simulated workers: {refusal}.")
        check_gradients(module.learner, module.objective, batch, engine.meta_gradient)

    def _check_rule(self) -> None:
        try:
            self.merge_rule.weight({"share": 1.0, "tasks": 1, "iterations": 1, "validation_loss": 1.0})
        except KeyError as error:
            name = type(self.merge_rule).__name__
            raise ConfigError(
                f"trainer.strategy.merge is {name}, which weighs workers by their {error.args[0]}: take another {_FOR}."
            ) from error

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Lightning's, then the workers' weights in place of the module's, which keep the merged ones.

        Averaged gradients leave all workers alike: they are one, who has the tasks of all.
        """
        super().setup_optimizers(trainer)
        module, alike = self._module(), self.averages == "gradients"
        at_once = AT_ONCE if module.engine.task_chunk is None else module.engine.task_chunk
        self._stack = StackedWeights(module.learner, module.objective, 1 if alike else self.workers, at_once)
        self._stack.take_place(self.optimizers[0])
        self._sources: list[Any] = []

    def training_step(self, tasks: Any, batch_idx: int) -> RunReport:
        """Make the run of every worker, and merge them.

        Raises:
            NonFiniteError: the loss or a weight of a worker is not finite.
        """
        module = self._module()
        run, clock, done = module.runs_done, RunClock(), module.trainer.global_step
        limit = int(module.limits_of_run()[0])
        outer, listeners = OuterStep(module, None), module.listeners("on_meta_iteration_end")
        # Of its own, as a source may have sampled ahead for a worker.
        self._sources = self._sources or [copy.copy(tasks) for _ in range(self.workers)]
        losses, metrics = [], []
        for iteration in range(limit):
            module.answer_the_outside(self)
            batch = self._sample(run, iteration).to(module.device)
            module.algorithm.begin(done + iteration)
            loss, metric = self._stack.meta_gradients(batch)
            self._require_finite("the query loss", loss, run, iteration)
            if module.gradient_clip is not None:
                self._stack.clip(module.gradient_clip)
            losses.append(loss.mean())
            outer.step(losses[-1], _once)
            metrics.append(metric.mean())
            for tell in listeners:
                tell(module.trainer, module, iteration + 1, limit, float(losses[-1]))
        self._require_finite("a weight", self._stack.rows().sum(1), run, limit - 1)
        series = {"loss": torch.stack(losses).cpu()}
        if not module.objective.shows_its_loss:
            series[module.objective.metric] = torch.stack(metrics).cpu()
        seen = limit * batch.tasks
        report: RunReport = {"loss": series["loss"].mean(), "series": series, "tasks": seen, "iterations": limit}
        report["merge"] = self._merge_all(report)
        module.runs_done += 1
        module.tasks_seen += seen
        report["seconds"], report["cpu_seconds"] = clock.seconds(), clock.cpu_seconds()
        return report

    def _sample(self, run: int, iteration: int) -> TaskBatch:
        """The tasks of all workers, the first worker's first."""
        batches = [
            source.sample(worker=worker, run=run, iteration=iteration, act=None)
            for worker, source in enumerate(self._sources)
        ]
        columns = zip(*(batch.tensors() for batch in batches), strict=True)
        joined: TaskBatch = batches[0].with_tensors([torch.cat(column) for column in columns])
        return joined

    def _require_finite(self, what: str, of_workers: Tensor, run: int, iteration: int) -> None:
        finite = torch.isfinite(of_workers)
        if not bool(finite.all()):
            raise NonFiniteError(what, worker=int(finite.logical_not().nonzero()[0]), run=run, iteration=iteration)

    def _merge_all(self, report: RunReport) -> dict[str, float]:
        """Make the workers' weights one, theirs and the module's; returns what is told of the merge."""
        state, rows = FlatState(self._module()), self._stack.rows()
        start = state.pack_floats()
        start, buffers = start.tensor_split([state.parameter_size])
        moments = [moment for optimizer in self.optimizers for moment in moments_of(optimizer)]
        figures = report["series"].values()
        told = {"merge/bytes": self._bytes(state, buffers.numel(), moments, sum(len(each) for each in figures))}
        if self.averages == "gradients":
            told["merge/gradient_bytes"] = float(start.element_size() * (start.numel() + 1 + self.workers))
            state.unpack_floats(torch.cat([rows[0], buffers]))
            return told if self.workers > 1 else {}
        weights = rows.new_tensor(self._weights(state, rows, buffers, report))
        mean = start + (weights @ (rows - start)) / weights.sum() if self.workers > 1 else rows[0]
        merged = self.merge_rule.merge(start, mean)
        state.unpack_floats(torch.cat([merged, buffers]))
        self._stack.fill(merged)
        if self.workers == 1:
            return {}
        if self.moments == "average":
            for moment in moments:
                if moment.ndim:  # counts of steps are those of all
                    moment.copy_((torch.tensordot(weights, moment, 1) / weights.sum()).expand_as(moment))
        elif self.moments == "reset":
            self._forget_moments()
        squares = (rows - start).double().square().sum(1)
        return told | spread({"weight": weights, "squared_displacement": squares}, mean - start)

    def _weights(self, state: FlatState, rows: Tensor, buffers: Tensor, report: RunReport) -> list[float]:
        """How much each worker counts."""
        module, weights = self._module(), []
        own: RunReport = {"share": 1.0, "tasks": report["tasks"] // self.workers, "iterations": report["iterations"]}
        for row in rows if self.validation_tasks else rows[:1]:
            if self.validation_tasks:
                state.unpack_floats(torch.cat([row, buffers]))
            weights.append(self.merge_rule.weight(own | module.own_validation(self.validation_tasks)))
        return weights if self.validation_tasks else weights * self.workers

    def _bytes(self, state: FlatState, buffers: int, moments: list[Tensor], figures: int) -> float:
        """What a worker would send at the end of a run; see `Exchange`."""
        values = buffers + state.pack_integers().numel() + self.workers * (len(METRICS) + figures)
        if self.averages == "weights":
            values += state.parameter_size
            if self.moments == "average":
                values += sum(math.prod(moment.shape[1:]) for moment in moments)
        return float(values * state.like.element_size())


def _once(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("the step of stacked weights was tried: it evaluates once")

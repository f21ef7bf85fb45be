"""What every algorithm promises, in every engine: its tests inherit this class, and write its formula out."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from data_modules import Sinusoid
from dmaml_pl import MLP, Conv4
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import Engine, EngineChoice, EngineName, Learn2LearnEngine, VectorizedEngine
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective, objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import same

FAST: list[EngineName] = ["per_task", "vectorized"]
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


class AlgorithmPromises(ABC):
    """Tests of an algorithm, in float64 on sine curves; a subclass says which, and may take another problem."""

    first_orders: tuple[bool, ...] = (False, True)
    learning_steps = 150

    @abstractmethod
    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        """A new one, of two or more inner steps."""

    @abstractmethod
    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The formula: the query loss of one task (no T axis) after adaptation, differentiable by `meta`.

        `loss` is that of the network with some weights on inputs and targets.
        """

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP(hidden=[8, 8]).double()

    def objective(self) -> Objective:
        return objective_of("regression")

    def batch(self, tasks: int = 3, number: int = 0) -> TaskBatch:
        data = Sinusoid(meta_batch=tasks, seed=0, queries=7)
        return data.sample(worker=0, run=0, iteration=number).map(Tensor.double)

    def learner(self, *, first_order: bool = False) -> MetaLearner:
        return MetaLearner(self.network(), self.algorithm(first_order=first_order))

    def meta_gradient(self, learner: MetaLearner, batch: TaskBatch, engine: Engine | None = None) -> Weights:
        """By the engine of all tasks at once where no other is given."""
        learner.zero_grad()
        (engine or VectorizedEngine(self.objective())).meta_gradient(learner, batch)
        return {name: w.grad.clone() for name, w in learner.meta().items() if w.grad is not None}

    def engines(self, learner: MetaLearner, batch: TaskBatch) -> list[Engine]:
        """All that can execute the algorithm."""
        fast = [EngineChoice(name, self.objective()).for_training(learner, batch) for name in FAST]
        reference = Learn2LearnEngine(self.objective())
        return fast if reference.refusal(learner, batch) else [reference, *fast]

    # -- the four kinds --------------------------------------------------------------------------------------------

    def test_the_meta_gradient_of_every_engine_equals_the_formula(self) -> None:
        for first_order in self.first_orders:
            learner, batch, objective = self.learner(first_order=first_order), self.batch(), self.objective()
            meta = {name: w.detach().clone().requires_grad_(w.requires_grad) for name, w in learner.meta().items()}

            def loss(weights: Weights, x: Tensor, y: Tensor, learner: MetaLearner = learner) -> Tensor:
                own = {name: w for name, w in weights.items() if not name.startswith("algorithm.")}
                return self.objective().support_loss(functional_call(learner.network, own, (x,)), y)

            assert objective.shows_its_loss or type(objective).query_loss is Objective.query_loss
            losses = [self.task_loss(learner, meta, batch.task(n), loss) for n in range(batch.tasks)]
            names = [name for name, w in meta.items() if w.requires_grad]
            gradients = torch.autograd.grad(
                torch.stack(losses).mean(), [meta[name] for name in names], allow_unused=True
            )
            expected = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
            for engine in self.engines(learner, batch):
                found = self.meta_gradient(learner, batch, engine)
                assert found.keys() == expected.keys(), engine.name
                torch.testing.assert_close(found, expected, **TIGHT)

    def test_the_same_input_gives_the_same_bits(self) -> None:
        learner, batch = self.learner(), self.batch()
        assert same(self.meta_gradient(learner, batch), self.meta_gradient(learner, batch))

    def test_it_learns(self) -> None:
        learner, engine = self.learner(), VectorizedEngine(self.objective())
        optimizer = torch.optim.Adam(learner.param_groups(), lr=0.01)
        before = {name: w.detach().clone() for name, w in learner.meta().items()}
        losses = []
        for number in range(self.learning_steps):
            optimizer.zero_grad()
            losses.append(float(engine.meta_gradient(learner, self.batch(tasks=10, number=number)).loss))
            optimizer.step()
        assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
        learned = [name for name, w in learner.meta().items() if w.grad is not None]
        assert all(not torch.equal(before[name], learner.meta()[name]) for name in learned)

    # -- properties ------------------------------------------------------------------------------------------------

    def test_tasks_at_once_equal_tasks_one_by_one(self) -> None:
        learner, batch = self.learner(), self.batch()
        alone = [self.meta_gradient(learner, batch.map(lambda t, n=n: t[n : n + 1])) for n in range(batch.tasks)]  # type: ignore[misc]
        for name, gradient in self.meta_gradient(learner, batch).items():
            torch.testing.assert_close(gradient, sum(own[name] for own in alone) / batch.tasks, **TIGHT)

    def test_the_order_of_the_tasks_does_not_matter(self) -> None:
        learner, batch = self.learner(), self.batch()
        backwards = self.meta_gradient(learner, batch.map(lambda tensor: tensor.flip(0)))
        torch.testing.assert_close(self.meta_gradient(learner, batch), backwards, **TIGHT)

    def test_a_traced_meta_gradient_equals_the_eager_one_at_other_weights(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(compiler, "machine_code", lambda graph, examples: graph)
        learner, batch = self.learner(), self.batch()
        traced = VectorizedEngine(self.objective(), compiled=True)
        with caplog.at_level(logging.INFO):
            self.meta_gradient(learner, batch, traced)
            with torch.no_grad():
                for weight in learner.meta().values():
                    weight.add_(0.01)
            other = self.batch(number=1)
            torch.testing.assert_close(
                self.meta_gradient(learner, other, traced), self.meta_gradient(learner, other), **TIGHT
            )
        assert [record.message for record in caplog.records if "ompil" in record.message] == [
            "Compiling the meta-gradient ..."
        ]

    def test_what_is_frozen_stays_frozen(self) -> None:
        network = self.network()
        frozen = next(network.parameters()).requires_grad_(False)
        learner, batch = MetaLearner(network, self.algorithm()), self.batch()
        name = next(name for name, w in learner.meta().items() if w is frozen)
        for engine in self.engines(learner, batch):
            found = self.meta_gradient(learner, batch, engine)
            assert found
            assert name not in found
        assert frozen.grad is None

    def test_own_meta_parameters_get_gradients_in_every_engine(self) -> None:
        learner, batch = self.learner(), self.batch()
        own = {f"algorithm.{name}" for name, p in learner.algorithm.named_parameters() if p.requires_grad}
        for engine in self.engines(learner, batch):
            found = self.meta_gradient(learner, batch, engine)
            assert own <= found.keys(), engine.name
            assert all(bool(found[name].abs().sum() > 0) for name in own), engine.name

    def test_evaluation_leaves_weights_and_gradients_alone_and_is_the_same_in_every_engine(self) -> None:
        learner, batch = self.learner(), self.batch()
        before = copy.deepcopy(learner.state_dict())
        curves = [engine.adaptation_curve(learner, batch, 4) for engine in self.engines(learner, batch)]
        for curve in curves:
            assert curve.loss.shape == curve.metric.shape == (3, 5)
            torch.testing.assert_close(curve, curves[0], **TIGHT)
        assert same(before, learner.state_dict())
        assert all(w.grad is None for w in learner.parameters())


class StepPromises(AlgorithmPromises):
    """Tests of an algorithm of two steps, of which a subclass writes out the formula of a step."""

    @abstractmethod
    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        """The adapting weights after step `number` of one task (no T axis), from those before it and their gradients.

        `meta` has the algorithm's own parameters.
        """

    def placed(self, meta: Weights, weights: Weights, number: int) -> Weights:
        """All weights that the network runs with after `number` steps."""
        return weights

    def outcome(self, losses: list[Tensor]) -> Tensor:
        """What is differentiated, from the query losses after each step."""
        return losses[-1]

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights, second_order, names = dict(meta), not learner.algorithm.first_order, learner.algorithm.adapts
        losses = []
        for number in range(2):
            support = loss(self.placed(meta, weights, number), task.support_x, task.support_y)
            found = torch.autograd.grad(support, [weights[name] for name in names], create_graph=second_order)
            gradients = dict(zip(names, found, strict=True))
            weights |= self.stepped(meta, {name: weights[name] for name in names}, gradients, number)
            losses.append(loss(self.placed(meta, weights, number + 1), task.query_x, task.query_y))
        return self.outcome(losses)


class Images:
    """Five classes of noisy pictures and a small convolutional network, in the place of sine curves."""

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return Conv4(filters=4, image_size=16).double()

    def objective(self) -> Objective:
        return objective_of("classification")

    def batch(self, tasks: int = 2, number: int = 0) -> TaskBatch:
        generator = torch.Generator().manual_seed(number)
        classes = torch.randn(tasks, 5, 1, 16, 16, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, tasks, 5, 1, 16, 16, generator=generator, dtype=torch.float64)
        y = torch.arange(5).expand(tasks, 5)
        return TaskBatch.of(classes + noise[0], y, classes + noise[1], y)


def check_with_convolutions(promises: type[AlgorithmPromises], engines: int = 2) -> None:
    """What the promises say of the formula, in so many engines, with convolutions and batch norms."""
    kind: type[AlgorithmPromises] = type(promises.__name__, (Images, promises), {"__test__": False})
    own = kind()
    assert len(own.engines(own.learner(), own.batch())) == engines
    own.test_the_meta_gradient_of_every_engine_equals_the_formula()

"""iMAML: the implicit meta-gradient, held to the linear system solved outright, in memory that steps do not fill."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dmaml_pl import IMAML, MAML, MLP, Conv4
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.algorithms.imaml import _solve
from dmaml_pl.engines import EngineChoice, VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import FAST, TIGHT, AlgorithmPromises


class TestIMAML(AlgorithmPromises):
    """(1 + H / lambda)^-1 g, where gradient descent with lambda / 2 * |w - w_0|^2 has come to."""

    first_orders = (False,)  # no derivative of a step is taken that could be left out
    adapts: list[str] | None = None
    hidden: tuple[int, ...] = (4,)
    cg_steps = 15
    damping = 0.0
    learning_steps = 140

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP(hidden=self.hidden).double()

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        settings: Any = {"cg_steps": self.cg_steps, "damping": self.damping, "adapts": self.adapts}
        return IMAML(0.01, inner_steps=3, regularization=50.0, **settings)

    def test_it_learns(self) -> None:
        self.hidden, self.cg_steps = (20, 20), 3
        super().test_it_learns()

    def test_a_traced_meta_gradient_equals_the_eager_one_at_other_weights(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.cg_steps = 3
        super().test_a_traced_meta_gradient_equals_the_eager_one_at_other_weights(monkeypatch, caplog)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        adapts, fixed = learner.algorithm.adapts, {name: w.detach() for name, w in meta.items()}
        sizes, shapes = [meta[name].numel() for name in adapts], [meta[name].shape for name in adapts]

        def named(flat: Tensor) -> Weights:
            parts = flat.split(sizes)
            return {name: part.view(shape) for name, part, shape in zip(adapts, parts, shapes, strict=True)}

        def support(flat: Tensor, others: Weights = fixed) -> Tensor:
            return loss(others | named(flat), task.support_x, task.support_y)

        start = torch.cat([fixed[name].flatten() for name in adapts])
        flat = start.clone()
        for _ in range(3):
            (slope,) = torch.autograd.grad(support(at := flat.clone().requires_grad_()), at)
            flat = flat - 0.01 * (slope + 50.0 * (flat - start))
        at = flat.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(fixed | named(at), task.query_x, task.query_y), at)
        curvature = torch.autograd.functional.hessian(support, flat)
        strength = 50.0 + self.damping
        v = torch.linalg.solve(curvature + strength * torch.eye(len(flat), dtype=flat.dtype), g)
        # The derivative of the minimum by w_0 is 50 (H + 50)^-1, by another weight -(H + 50)^-1 d(slope)/d(weight).
        (slope,) = torch.autograd.grad(support(at, meta), at, create_graph=True)
        center = torch.cat([meta[name].flatten() for name in adapts])
        direct = loss(meta | named(flat), task.query_x, task.query_y)
        found: Tensor = direct + strength * (center @ v) - slope @ v
        return found


class TestDampedIMAML(TestIMAML):
    """(1 + H / (lambda + damping))^-1 g."""

    damping = 30.0


class TestIMAMLOfTheHead(TestIMAML):
    """The body does not adapt, but the minimum depends on it."""

    adapts = ["layers.2.*"]  # noqa: RUF012 - as the setting is

    def test_it_learns(self) -> None:
        """Learning is shown where all adapts; here that what does not adapt moves the loss as its gradient says."""
        learner, batch, engine = self.learner(), self.batch(), VectorizedEngine(self.objective())
        before = engine.meta_gradient(learner, batch).loss
        torch.optim.SGD(learner.parameters(), lr=1e-3).step()
        assert engine.meta_gradient(learner, batch).loss < before

    def test_the_body_is_learned(self) -> None:
        learner = self.learner()
        assert self.meta_gradient(learner, self.batch()).keys() == learner.meta().keys()


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_every_engine_gives_the_same_for_convolutions_with_normalization(normalization: Any) -> None:
    torch.manual_seed(0)
    network = Conv4(ways=3, filters=4, image_size=16, normalization=normalization).double()
    learner, objective = MetaLearner(network, IMAML(inner_steps=2, cg_steps=3)), objective_of("classification")
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 6, 1, 16, 16, generator=generator, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    batch, found = TaskBatch.of(x, y, x.flip(1), y.flip(1)), []
    for name in FAST:
        learner.zero_grad()
        EngineChoice(name, objective).for_training(learner, batch).meta_gradient(learner, batch)
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], **TIGHT)


def most_kept(algorithm: Algorithm) -> int:
    """Bytes that graphs keep for derivatives at a time, at most, in one meta-gradient."""
    promises, now, most = TestIMAML(), 0, 0
    learner, batch = MetaLearner(promises.network(), algorithm), promises.batch()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            now += tensor.nbytes
            most = max(most, now)
            weakref.finalize(self, self.forget, tensor.nbytes)

        @staticmethod
        def forget(size: int) -> None:
            nonlocal now
            now -= size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        promises.meta_gradient(learner, batch)
    return most


def test_the_memory_does_not_grow_with_the_steps() -> None:
    assert most_kept(IMAML(inner_steps=2)) == most_kept(IMAML(inner_steps=20)) > 0
    assert most_kept(MAML(inner_steps=20)) > 3 * most_kept(MAML(inner_steps=2))


def test_the_weights_between_are_kept_in_evaluation_alone() -> None:
    promises = TestIMAML()
    learner, batch = promises.learner(), promises.batch()
    curve = VectorizedEngine(promises.objective()).adaptation_curve(learner, batch, 3).loss
    assert len(set(curve[0].tolist())) == 4
    tasks = VectorizedEngine(promises.objective())._tasks(learner, {}, batch)
    path = learner.algorithm.adapt(learner.meta(), tasks, 3, create_graph=True)
    assert len(path) == 4
    assert all(fast is path[-1] for fast in path)


def test_a_strong_regularization_gives_the_gradient_at_the_meta_weights() -> None:
    """The minimum is then the start, and the system the identity."""
    promises = TestIMAML()
    batch, network = promises.batch(tasks=1), promises.network()
    learner = MetaLearner(network, IMAML(inner_lr=1e-12, inner_steps=1, regularization=1e9))
    found = promises.meta_gradient(learner, batch)
    weights: Weights = dict(network.named_parameters())
    loss = promises.objective().query_loss(functional_call(network, weights, (batch.query_x[0],)), batch.query_y[0])
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_solve_each_tasks_own_system_and_stop_where_they_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT + torch.eye(5)
    matrices[1] = -matrices[1]
    wanted = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    wanted[2] = 0
    found = _solve(lambda v: {"w": (matrices @ v["w"].unsqueeze(-1)).squeeze(-1)}, {"w": wanted}, 20)["w"]
    torch.testing.assert_close(found[0], torch.linalg.solve(matrices[0], wanted[0]), **TIGHT)
    assert not found[1:].any()


def test_a_loss_without_curvature_is_no_obstacle() -> None:
    """The cross-entropy of one class alone is flat."""
    network = nn.Linear(1, 1).double()
    x, y = torch.ones(2, 3, 1, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    learner = MetaLearner(network, IMAML(inner_steps=2))
    VectorizedEngine(objective_of("classification")).meta_gradient(learner, TaskBatch.of(x, y, x, y))
    assert cross_entropy(network(x[0]), y[0]) == 0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.algorithm.regularization is 0"):
        IMAML(regularization=0.0)
    with pytest.raises(ConfigError, match=r"model.algorithm.cg_steps is 0"):
        IMAML(cg_steps=0)
    with pytest.raises(ConfigError, match=r"model.algorithm.damping is -1"):
        IMAML(damping=-1.0)

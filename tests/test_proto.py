"""Heads made of prototypes: ProtoNet against learn2learn's, ProtoMAML, and any number of ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from dmaml_pl import MLP, PMF, Conv4, ProtoMAML, ProtoNet
from dmaml_pl._learn2learn import load
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.algorithms.pmf import augmented
from dmaml_pl.engines import EngineChoice, VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective, objective_of
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import FAST, TIGHT, AlgorithmPromises

WAYS = 3


class OnImages(AlgorithmPromises):
    """Of classes that differ in their pattern, under noise."""

    __test__ = False
    learning_steps = 40

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return Conv4(ways=WAYS, filters=4, image_size=16).double()

    def objective(self) -> Objective:
        return objective_of("classification")

    def batch(self, tasks: int = 3, number: int = 0, ways: int = WAYS) -> TaskBatch:
        """Few tasks, of patterns so coarse that few show how to find them."""
        generator, tasks = torch.Generator().manual_seed(number), min(tasks, 4)
        patterns = torch.rand(tasks, ways, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
        patterns = patterns.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)
        noise = torch.rand(tasks, ways, 5, 1, 16, 16, generator=generator, dtype=torch.float64)
        x, y = patterns + noise, torch.arange(ways).view(1, ways, 1).expand(tasks, ways, 5)
        support, query = (x[:, :, :2], y[:, :, :2]), (x[:, :, 2:], y[:, :, 2:])
        return TaskBatch.of(*(tensor.flatten(1, 2) for tensor in (*support, *query)))

    def outputs(self, learner: MetaLearner, batch: TaskBatch) -> Tensor:
        """Before the first step, (T, Q, N)."""
        return VectorizedEngine(self.objective()).predict(learner, batch, 0)[:, 0]

    # Python's own reference: what a class of a task is, in a loop.

    def prototypes(self, learner: MetaLearner, meta: Weights, task: TaskBatch) -> Tensor:
        features = self.features(learner, meta, task.support_x)
        return torch.stack([features[task.support_y == way].mean(dim=0) for way in range(task.ways)])

    def features(self, learner: MetaLearner, meta: Weights, x: Tensor) -> Tensor:
        own = {name.removeprefix("features."): w for name, w in meta.items() if name.startswith("features.")}
        body: Any = learner.network.features
        found: Tensor = functional_call(body, own, (x,)).flatten(1)
        return found

    # -- properties ------------------------------------------------------------------------------------------------

    def test_the_heads_own_weights_are_not_learned(self) -> None:
        found = self.meta_gradient(learner := self.learner(), self.batch())
        assert found.keys() == {name for name in learner.meta() if not name.startswith("head.")}

    def test_other_labels_permute_the_outputs(self) -> None:
        learner, batch = self.learner(), self.batch()
        to = torch.tensor([2, 0, 1])
        (support,) = batch.support
        permuted = batch._replace(
            support=(support._replace(y=to[batch.support_y]),), query=batch.query._replace(y=to[batch.query_y])
        )
        steps, engine = learner.algorithm.steps, VectorizedEngine(self.objective())
        before, after = (engine.predict(learner, given, steps)[:, -1] for given in (batch, permuted))
        torch.testing.assert_close(after[..., to], before, **TIGHT)
        torch.testing.assert_close(self.meta_gradient(learner, permuted), self.meta_gradient(learner, batch), **TIGHT)

    def test_tasks_may_have_more_or_fewer_classes_than_the_network_has_outputs(self) -> None:
        for ways in (2, 6):
            learner, batch, found = self.learner(), self.batch(ways=ways), []
            for name in FAST:
                engine = EngineChoice(name, self.objective()).for_training(learner, batch)
                assert engine.predict(learner, batch, 1).shape == (3, 2, 3 * ways, ways)
                found.append(self.meta_gradient(learner, batch, engine))
            torch.testing.assert_close(found[0], found[1], **TIGHT)

    def test_a_regression_is_refused(self) -> None:
        y = torch.rand(2, 4, 1)
        batch = TaskBatch.of(torch.rand(2, 4, 1, 16, 16), y, torch.rand(2, 4, 1, 16, 16), y)
        with pytest.raises(ConfigError, match=r"which needs classes, but the tasks have real targets: set"):
            self.outputs(MetaLearner(self.network().float(), self.algorithm()), batch)

    def test_a_network_without_an_embedding_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"but MLP is no embedding and head: set model.network to one with"):
            self.algorithm().attach(MLP())


class TestProtoNet(OnImages):
    """Cross-entropy of -|z - c|^2."""

    __test__ = True
    first_orders = (False,)  # there is no step to be differentiated

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return ProtoNet()

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        prototypes, queries = self.prototypes(learner, meta, task), self.features(learner, meta, task.query_x)
        distances = torch.stack([(queries - c).square().sum(dim=1) for c in prototypes], dim=1)
        return cross_entropy(-distances, task.query_y)

    def test_it_equals_learn2learns(self) -> None:
        """learn2learn's classifier needs the support set, which what `model.engine: learn2learn` runs is not given."""
        learner, batch = self.learner(), self.batch()
        losses = []
        for number, ours in enumerate(self.outputs(learner, batch)):
            task, network = batch.task(number), cast("Conv4", learner.network)
            support, query = (network.embed(x) for x in (task.support_x, task.query_x))
            theirs = load().nn.PrototypicalClassifier(support, task.support_y)(query)
            torch.testing.assert_close(ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1), rtol=1e-9, atol=1e-9)
            losses.append(cross_entropy(theirs, task.query_y))
        body = {name: w for name, w in learner.meta().items() if not name.startswith("head.")}
        expected = dict(zip(body, torch.autograd.grad(torch.stack(losses).mean(), list(body.values())), strict=True))
        torch.testing.assert_close(self.meta_gradient(learner, batch), expected, rtol=1e-9, atol=1e-9)

    def test_further_steps_change_nothing(self) -> None:
        learner, batch = self.learner(), self.batch()
        curve = VectorizedEngine(self.objective()).adaptation_curve(learner, batch, 3).loss
        assert torch.equal(curve, curve[:, :1].expand(-1, 4))


class TestPMF(TestProtoNet):
    """ProtoNet in training; then the body follows the prototypes' cross-entropy of changed pictures, by Adam."""

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return PMF(inner_lr=0.01)

    def test_further_steps_change_nothing(self) -> None:
        """They do, as `torch.optim.Adam` would the body, with prototypes made anew after every step."""
        learner, batch = self.learner(), self.batch()
        found = VectorizedEngine(self.objective()).predict(learner, batch, 3)
        for number in range(batch.tasks):
            task, network = batch.task(number), cast("Conv4", self.network())
            body = list(network.features.parameters())
            optimizer = torch.optim.Adam(body, lr=0.01)

            def outputs(x: Tensor, task: TaskBatch = task, network: Conv4 = network) -> Tensor:
                features = network.embed(task.support_x)
                means = torch.stack([features[task.support_y == way].mean(dim=0) for way in range(WAYS)])
                return -torch.cdist(network.embed(x), means).square()

            for step in range(4):
                with torch.no_grad():
                    expected = outputs(task.query_x).log_softmax(dim=-1)
                    torch.testing.assert_close(found[number, step].log_softmax(dim=-1), expected, rtol=1e-6, atol=1e-6)
                changed = augmented(task.support_x.unsqueeze(0), step)[0]
                optimizer.zero_grad()
                cross_entropy(outputs(changed), task.support_y).backward()
                optimizer.step()

    def test_pictures_are_moved_and_brightened_the_same_way_at_every_start(self) -> None:
        x = torch.rand(2, 5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(augmented(x, 3), augmented(x, 3))
        assert not torch.equal(augmented(x, 3), augmented(x, 4))
        ours = augmented(x, 3)[0, 0, 0]
        shifts = [x[0, 0, 0].roll((down, right), (0, 1)) for down in range(-2, 3) for right in range(-2, 3)]
        inside = slice(2, -2)
        spreads = [float((ours - shifted)[inside, inside].std()) for shifted in shifts]
        assert min(spreads) < 1e-6 < sorted(spreads)[1]


class TestProtoMAML(OnImages):
    """The head starts at 2 c and -|c|^2; then w' = w - inner_lr * dL(support; w)/dw."""

    __test__ = True

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return ProtoMAML(inner_lr=0.01, inner_steps=2, first_order=first_order)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        c, second_order = self.prototypes(learner, meta, task), not learner.algorithm.first_order
        # Weights of their own: the head's start is no function of what adapts with it.
        weights = {name: w * 1.0 for name, w in meta.items()}
        weights |= {"head.weight": 2 * c, "head.bias": -c.square().sum(dim=1)}

        def outputs(weights: Weights, x: Tensor) -> Tensor:
            return linear(self.features(learner, weights, x), weights["head.weight"], weights["head.bias"])

        for _ in range(2):
            at = weights if second_order else {name: w.detach().requires_grad_() for name, w in weights.items()}
            support = cross_entropy(outputs(at, task.support_x), task.support_y)
            gradients = torch.autograd.grad(support, list(at.values()), create_graph=second_order)
            weights = {name: weights[name] - 0.01 * g for name, g in zip(at, gradients, strict=True)}
        return cross_entropy(outputs(weights, task.query_x), task.query_y)

    def test_without_steps_that_change_anything_it_equals_protonet(self) -> None:
        batch = self.batch()
        still = MetaLearner(self.network(), ProtoMAML(inner_lr=1e-30, inner_steps=1))
        without = MetaLearner(self.network(), ProtoNet())
        torch.testing.assert_close(self.outputs(still, batch), self.outputs(without, batch), **TIGHT)
        found, expected = (self.meta_gradient(learner, batch) for learner in (still, without))
        torch.testing.assert_close(found, expected, **TIGHT)

    def test_the_head_adapts_whatever_else_does(self) -> None:
        algorithm = ProtoMAML(adapts=["features.0.bias"])
        algorithm.attach(self.network())
        assert algorithm.adapts == ["features.0.bias", "head.weight", "head.bias"]


def test_a_head_that_is_not_linear_is_refused() -> None:
    network = Conv4()
    network.head = nn.Linear(64, 5, bias=False)
    with pytest.raises(ConfigError, match=r"ProtoNet, .*Conv4 is no embedding and head: .* nn.Linear with a bias"):
        ProtoNet().attach(network)

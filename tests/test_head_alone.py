"""Where only the head adapts: the embedding of a set is computed once, and all comes out as if it were not."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmaml_pl import MAML, MLP, Conv4, MetaLearning
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import Engine, PerTaskEngine, VectorizedEngine
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.engines.base import AdaptationCurve
from dmaml_pl.engines.loop import NetworkTasks, at_once
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import Samples, TaskBatch
from tests.recipes import small_data, small_trainer

ENGINES = [VectorizedEngine, PerTaskEngine]
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
HEAD = ["head.*"]
WAYS = 3


class Counted(Conv4):
    """Counts how often its body is run, also by its copies."""

    runs: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__(ways=WAYS, image_size=16, filters=4)

    def embed(self, x: Tensor) -> Tensor:
        self.runs.append("body")
        return super().embed(x)


class Unsplit(nn.Module):
    """The same network with the same names, which does not say what its embedding is."""

    def __init__(self, split: Conv4) -> None:
        super().__init__()
        self.features = split.features
        self.head = split.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))  # type: ignore[no-any-return]


def conv4(*, frozen: bool = False) -> Counted:
    torch.manual_seed(0)
    network = Counted().double()
    network.features.requires_grad_(not frozen)
    return network


def batch_of(tasks: int = 3, steps: int = 1) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def samples(each: int) -> Samples:
        x = torch.rand(tasks, WAYS * each, 1, 16, 16, generator=generator, dtype=torch.float64)
        return Samples(x, torch.arange(WAYS).repeat(tasks, each))

    return TaskBatch(tuple(samples(2) for _ in range(steps)), samples(3))


def found(network: nn.Module, engine: Engine, batch: TaskBatch, first_order: bool) -> tuple[Any, AdaptationCurve]:
    """Loss, metric and meta-gradients by name; and the adaptation curve."""
    learner = MetaLearner(network, MAML(adapts=HEAD, inner_lr=0.3, inner_steps=3, first_order=first_order))
    learner.zero_grad()
    outcome = engine.meta_gradient(learner, batch)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return (outcome, gradients), engine.adaptation_curve(learner, batch, 5)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_and_the_curve_are_those_of_running_it_all(
    kind: type[Any], frozen: bool, first_order: bool
) -> None:
    objective, batch, network = objective_of("classification"), batch_of(steps=2), conv4(frozen=frozen)
    ours = found(network, kind(objective), batch, first_order)
    theirs = found(Unsplit(network), kind(objective), batch, first_order)
    (_, gradients), _ = ours
    assert {name.partition(".")[0] for name in gradients} == ({"head"} if frozen else {"features", "head"})
    torch.testing.assert_close(ours, theirs, **TIGHT)


def test_predictions_and_acting_are_those_of_running_it_all() -> None:
    objective, batch, network = objective_of("classification"), batch_of(steps=2), conv4()
    for kind in ENGINES:
        results = []
        for given in (network, Unsplit(network)):
            learner, engine = MetaLearner(given, MAML(adapts=HEAD, inner_lr=0.3, inner_steps=2)), kind(objective)
            acting = engine.act(learner, batch.support)
            results.append((engine.predict(learner, batch, 4), acting(batch.query.x)))
        torch.testing.assert_close(results[0], results[1], **TIGHT)


@pytest.mark.parametrize(("kind", "times"), [(VectorizedEngine, 1), (PerTaskEngine, 3)])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_body_is_run_once_for_the_support_and_once_for_the_query_set(
    kind: type[Any], times: int, first_order: bool
) -> None:
    network, engine, batch = conv4(), kind(objective_of("classification")), batch_of()
    learner = MetaLearner(network, MAML(adapts=HEAD, inner_lr=0.3, inner_steps=4, first_order=first_order))
    engine.refusal(learner, batch)
    network.runs.clear()
    engine.meta_gradient(learner, batch)
    assert len(network.runs) == 2 * times
    network.runs.clear()
    engine.adaptation_curve(learner, batch, 6)
    assert len(network.runs) == 2 * times


def test_of_a_frozen_body_no_graph_is_kept() -> None:
    network, batch = conv4(frozen=True), batch_of()
    tasks = NetworkTasks(network, {}, objective_of("classification"), batch, at_once)
    meta: Weights = dict(network.named_parameters())
    features = tasks.run(meta, {}, batch.support_x, part="embed")
    assert not features.requires_grad
    network.features.requires_grad_(True)
    assert tasks.run(meta, {}, batch.support_x, part="embed").requires_grad
    with torch.no_grad():
        assert not tasks.run(meta, {}, batch.support_x, part="embed").requires_grad


def test_features_are_computed_again_for_other_weights_and_other_inputs() -> None:
    network, batch = conv4(), batch_of()
    network.runs.clear()
    tasks = NetworkTasks(network, {}, objective_of("classification"), batch, at_once)
    meta: Weights = dict(network.named_parameters())
    doubled = {name: w * 2 for name, w in meta.items()}
    one, again, other, query = (
        tasks.run(meta, {}, batch.support_x, part="embed"),
        tasks.run(dict(meta), {}, batch.support_x, part="embed"),
        tasks.run(doubled, {}, batch.support_x, part="embed"),
        tasks.run(meta, {}, batch.query_x, part="embed"),
    )
    assert one is again
    assert network.runs == ["body"] * 3
    assert not torch.equal(one, other)
    assert one.shape == (3, 2 * WAYS, 4)
    assert query.shape == (3, 3 * WAYS, 4)


def test_a_traced_meta_gradient_is_the_eager_one_at_other_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "machine_code", lambda graph, examples: graph)
    objective, network = objective_of("classification"), conv4()
    learner, results = MetaLearner(network, MAML(adapts=HEAD, inner_lr=0.3, inner_steps=2)), []
    traced = VectorizedEngine(objective, compiled=True)
    with caplog.at_level(logging.INFO):
        traced.meta_gradient(learner, batch_of())
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.01)
        for engine in (traced, VectorizedEngine(objective)):
            learner.zero_grad()
            outcome = engine.meta_gradient(learner, batch_of(steps=1))
            results.append((outcome, {name: p.grad for name, p in network.named_parameters()}))
    assert "no effect" not in caplog.text
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


class Tempered(nn.Module):
    """Its output is not that of its head on its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 8)
        self.head = nn.Linear(8, 1)

    def embed(self, x: Tensor) -> Tensor:
        return self.body(x).relu()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.head(self.embed(x))  # type: ignore[no-any-return]


def test_a_network_that_is_more_than_its_embedding_and_head_is_refused_in_one_line() -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"Tempered, whose output is not head\(embed\(x\)\)"):
        small_trainer().fit(MetaLearning(Tempered(), MAML(adapts=HEAD)), small_data())
    small_trainer().fit(MetaLearning(Tempered(), MAML()), small_data())


class Tied(Tempered):
    """Its head holds a weight of its body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))  # type: ignore[no-any-return]


def test_a_body_that_holds_a_weight_of_the_head_is_run_with_it() -> None:
    x = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0))
    network = Tied()
    tasks = NetworkTasks(network, {}, objective_of("regression"), TaskBatch((), Samples(x, x)), at_once)
    meta = {name: 2 * weight for name, weight in network.named_parameters()}
    found = tasks.run(meta, {"head.bias": meta["head.bias"].expand(1, -1)}, x)
    torch.testing.assert_close(found[0], functional_call(network, meta, (x[0],)))


def test_the_last_layer_of_an_mlp_gives_its_output_of_its_embedding() -> None:
    network, x = MLP(2, [5, 4], 3), torch.rand(6, 2)
    assert network.embed(x).shape == (6, 4)
    assert torch.equal(network.layers[-1](network.embed(x)), network(x))

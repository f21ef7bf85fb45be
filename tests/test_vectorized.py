"""The vectorized engine, and the choice of an engine: the reference's meta-gradients, or one clear message."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from data_modules import Sinusoid
from dmaml_pl import MAML, Conv4, MetaLearning
from dmaml_pl.algorithms import Algorithm
from dmaml_pl.engines import Engine, EngineChoice, EngineName, Learn2LearnEngine, VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP
from dmaml_pl.objectives import Objective, objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import Recorder, same, small_data, small_maml, small_trainer, state_of

Weights = dict[str, Tensor]
FAST: list[EngineName] = ["vectorized", "per_task"]
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 0}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(hidden=[8, 8]),
    "batch": lambda: Conv4(ways=3, image_size=16, filters=4, normalization="batch"),
    "group": lambda: Conv4(ways=3, image_size=16, filters=4, normalization="group"),
    "none": lambda: Conv4(ways=3, image_size=16, filters=4, normalization="none"),
}


def made(network: Callable[[], Any]) -> Any:
    """A network whose weights are the same at every call."""
    torch.manual_seed(0)
    return network()


def network_of(kind: str) -> nn.Module:
    network: nn.Module = made(NETWORKS[kind]).double()
    return network


def objective_for(network: nn.Module) -> Objective:
    return objective_of("classification" if isinstance(network, Conv4) else "regression")


def batch_for(network: nn.Module, tasks: int = 3) -> TaskBatch:
    if not isinstance(network, Conv4):
        batch = Sinusoid(meta_batch=tasks, seed=0, queries=7).sample(worker=0, run=0, iteration=0)
        return batch.map(Tensor.double)
    generator = torch.Generator().manual_seed(1)

    def images(samples: int) -> Tensor:
        return torch.rand(tasks, samples, 1, 16, 16, generator=generator, dtype=torch.float64)

    labels = torch.arange(3).repeat(tasks, 1)
    return TaskBatch.of(images(3), labels, images(6), labels.repeat(1, 2))


def vectorized(network: nn.Module, rule: Algorithm, *, compiled: bool = False) -> VectorizedEngine:
    return VectorizedEngine(objective_for(network), compiled=compiled)


def gradients_by(engine: Engine | EngineChoice, network: nn.Module, rule: Algorithm) -> tuple[Weights, Tensor, Tensor]:
    learner, batch = MetaLearner(network, rule), batch_for(network)
    learner.zero_grad()
    if isinstance(engine, EngineChoice):
        engine = engine.for_training(learner, batch)
    outcome = engine.meta_gradient(learner, batch)
    gradients = {name: w.grad.clone() for name, w in learner.meta().items() if w.grad is not None}
    return gradients, outcome.loss, outcome.metric


def assert_equals_the_reference(
    network: nn.Module, rule: Algorithm, engine: Engine | EngineChoice | None = None, *, compiled: bool = False
) -> None:
    engine = vectorized(network, rule, compiled=compiled) if engine is None else engine
    expected, loss, metric = gradients_by(Learn2LearnEngine(objective_for(network)), network, rule)
    found, found_loss, found_metric = gradients_by(engine, network, rule)
    assert found.keys() == expected.keys()
    torch.testing.assert_close((found_loss, found_metric), (loss, metric), **TIGHT)
    # Relative to each tensor's norm: where batch norm follows, a bias has no gradient but rounding errors.
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error <= 1e-9 * max(float(gradient.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_meta_gradient_equals_the_references(kind: str, steps: int, first_order: bool) -> None:
    assert_equals_the_reference(network_of(kind), MAML(inner_lr=0.1, inner_steps=steps, first_order=first_order))


def test_second_order_differs_from_first_order() -> None:
    second, first = (MAML(inner_lr=0.1, first_order=first_order) for first_order in (False, True))
    network = network_of("batch")
    assert not same(
        gradients_by(vectorized(network, second), network, second)[0],
        gradients_by(vectorized(network, first), network, first)[0],
    )


class WithSpare(nn.Module):
    """A network one of whose layers is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = MLP(hidden=[8])
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


@pytest.mark.parametrize("first_order", [False, True])
def test_frozen_and_unused_weights_are_left_alone_as_by_the_reference(first_order: bool) -> None:
    network = made(WithSpare).double()
    network.used.layers[0].weight.requires_grad_(False)
    rule = MAML(inner_lr=0.1, inner_steps=2, first_order=first_order)
    assert_equals_the_reference(network, rule)
    assert set(gradients_by(vectorized(network, rule), network, rule)[0]) == {
        "used.layers.0.bias",
        "used.layers.2.weight",
        "used.layers.2.bias",
    }


def test_tied_weights_and_constant_buffers_are_as_by_the_reference() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 4), nn.Linear(4, 4)
            self.third = nn.Linear(4, 4)
            self.third.weight = self.second.weight
            self.last = nn.Linear(4, 1)
            self.register_buffer("scale", torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.third(torch.tanh(self.second(self.first(x) * self.scale))))
            out: Tensor = self.last(hidden)
            return out

    assert_equals_the_reference(made(Tied).double(), MAML(inner_lr=0.1, inner_steps=2))


def test_a_layer_that_is_run_twice_under_two_names_is_as_by_the_reference_and_keeps_its_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.third = self.second

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.tanh(self.third(torch.tanh(self.second(self.first(x))))))
            return out

    network = made(Twice).double()
    weight = network.second.weight
    assert_equals_the_reference(network, MAML(inner_lr=0.1, inner_steps=2))
    assert network.second.weight is weight


def test_gradients_are_added_to_those_that_are_there_and_scaled_by_the_callers_backward() -> None:
    network, rule = network_of("mlp"), MAML(inner_lr=0.1)
    once = gradients_by(vectorized(network, rule), network, rule)[0]
    learner = MetaLearner(network, rule)
    vectorized(network, rule).meta_gradient(learner, batch_for(network), lambda loss: (2 * loss).backward())
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, 3 * once[name], **TIGHT)


def test_the_same_input_gives_the_same_meta_gradient() -> None:
    network, rule = network_of("batch"), MAML(inner_lr=0.1, inner_steps=2)
    first, second = (gradients_by(vectorized(network, rule), network, rule)[0] for _ in range(2))
    assert same(first, second)


def assert_judges_and_predicts_as_the_reference(network: nn.Module, engine: Engine) -> None:
    learner = MetaLearner(network, MAML(inner_lr=0.1))
    batch, before = batch_for(network), state_of(network)
    reference = Learn2LearnEngine(objective_for(network))
    torch.testing.assert_close(
        engine.adaptation_curve(learner, batch, steps=3), reference.adaptation_curve(learner, batch, steps=3), **TIGHT
    )
    torch.testing.assert_close(
        engine.predict(learner, batch, steps=3), reference.predict(learner, batch, steps=3), **TIGHT
    )
    assert same(before, state_of(network))
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind", ["mlp", "batch"])
def test_tasks_are_judged_and_predicted_as_by_the_reference(kind: str) -> None:
    network = network_of(kind)
    assert_judges_and_predicts_as_the_reference(network, vectorized(network, MAML(inner_lr=0.1)))


def test_a_training_of_30_meta_iterations_goes_the_same_way_with_every_engine() -> None:
    losses = []
    engines: list[EngineName] = ["learn2learn", "vectorized", "per_task"]
    for engine in engines:
        recorder = Recorder()
        module = small_maml(
            made(MLP), engine=engine, run_length=15, meta_optimizer=lambda params: torch.optim.Adam(params, lr=0.005)
        )
        small_trainer(max_steps=30, callbacks=[recorder]).fit(module, small_data(meta_batch=10))
        losses.append(torch.cat([report["series"]["loss"] for report in recorder.reports]))
    assert len(losses[0]) == 30
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], rtol=1e-3, atol=0)


class Summed(nn.Module):
    """A network two of whose weights have one gradient, which PyTorch then keeps in one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 8), nn.Linear(8, 1)
        self.one, self.other = (nn.Parameter(torch.rand(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)) @ (self.one + self.other))
        return out


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("engine", ["vectorized", "per_task"])
def test_weights_that_share_their_gradient_are_as_by_the_reference(engine: EngineName, first_order: bool) -> None:
    rule, network = MAML(inner_lr=0.1, first_order=first_order), made(Summed).double()
    assert_equals_the_reference(network, rule, EngineChoice(engine, objective_for(network), task_chunk=2))


@pytest.mark.parametrize("steps", [1, 5])
def test_pytorchs_batch_norm_has_a_wrong_second_derivative_where_vmap_runs_its_backward(steps: int) -> None:
    """Why this engine differentiates outside of vmap. Once PyTorch is right, this fails, and its reason may go."""
    network, rule = network_of("batch"), MAML(inner_lr=0.1, inner_steps=steps)
    batch, objective = batch_for(network), objective_for(network)

    def task_loss(weights: Weights, *task: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = task
        for _ in range(steps):
            gradients = grad(lambda w: objective.query_loss(functional_call(network, w, (support_x,)), support_y))(
                weights
            )
            weights = {name: w - rule.inner_lr * gradients[name] for name, w in weights.items()}
        return objective.query_loss(functional_call(network, weights, (query_x,)), query_y)

    tasks = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    meta = {name: p.detach() for name, p in network.named_parameters()}
    over_tasks = vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
    wrong = grad(lambda weights: over_tasks(weights, *tasks).mean())(meta)
    right = vmap(grad(task_loss), in_dims=(None, 0, 0, 0, 0))(meta, *tasks)
    expected = gradients_by(Learn2LearnEngine(objective), network, rule)[0]
    ours = gradients_by(vectorized(network, rule), network, rule)[0]
    name = "features.0.weight"
    size = float(expected[name].norm())
    assert float((wrong[name] - expected[name]).norm()) > 1e-4 * size
    assert float((right[name].mean(dim=0) - expected[name]).norm()) < 1e-9 * size
    assert float((ours[name] - expected[name]).norm()) < 1e-9 * size


def test_dropout_differs_between_tasks_and_follows_from_the_seed() -> None:
    rule = MAML(inner_lr=0.1)
    network = made(lambda: nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1)))
    learner = MetaLearner(network, rule)
    twice = batch_for(network).map(lambda tensor: tensor[:1].float().repeat(2, *[1] * (tensor.ndim - 1)))
    engine = vectorized(network, rule)
    predictions = []
    for _ in range(2):
        torch.manual_seed(5)
        predictions.append(engine.predict(learner, twice, steps=1))
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[0][0], predictions[0][1])


class DataDependent(nn.Module):
    """A network whose course depends on a value of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(hidden=[8])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(-x if x.sum().item() > 0 else x)
        return out


class Counting(DataDependent):
    """A network that writes a buffer as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize(
    ("network", "reason"),
    [(DataDependent, r"vmap: It looks like you're calling \.item\(\)"), (Counting, "it writes its buffer calls")],
)
def test_a_network_that_cannot_be_vectorized_is_refused_in_one_line(network: Any, reason: str) -> None:
    module = small_maml(made(network), engine="vectorized")
    before = state_of(module)
    message = rf"model\.engine is vectorized, but \w+ cannot be run .*\({reason}.*\): set model\.engine to learn2learn"
    with pytest.raises(ConfigError, match=message) as refused:
        module.engine.for_training(module.learner, next(iter(small_data().val_dataloader())))
    assert "\n" not in str(refused.value)
    assert same(before, state_of(module))


@pytest.mark.parametrize(("network", "other"), [(DataDependent, "per_task"), (Counting, "learn2learn")])
def test_auto_leaves_such_a_network_to_the_next_engine_and_says_so_once(
    network: Any, other: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    states = []
    engines: list[EngineName] = ["auto", other]
    with caplog.at_level(logging.INFO):
        for engine in engines:
            module = small_maml(made(network), engine=engine)
            small_trainer(limit_val_batches=1.0, val_check_interval=1).fit(module, small_data())
            states.append(state_of(module))
            assert module.engine_in_use == other
    assert [record.message.split(":")[0] for record in caplog.records if "engine" in record.message] == [
        f"model.engine is {other}"
    ]
    assert same(states[0], states[1])


def test_a_mistake_of_the_network_itself_is_not_mistaken_for_one_of_the_engine() -> None:
    module = small_maml(MLP(inputs=3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module.engine.for_training(module.learner, next(iter(small_data().val_dataloader())))


class Sign(Algorithm):
    """An algorithm that learn2learn does not have: steps of one size."""

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        return {name: fast[name] - 0.01 * torch.tanh(gradient) for name, gradient in gradients.items()}


def test_an_algorithm_that_learn2learn_has_not_is_refused_by_it_in_one_line_and_run_by_the_others() -> None:
    module = MetaLearning(MLP(), Sign(1), engine="learn2learn")
    told = r"model\.engine is learn2learn, but learn2learn has no Sign with these settings: set .* auto\."
    with pytest.raises(ConfigError, match=told):
        module.engine.for_training(module.learner, next(iter(small_data().val_dataloader())))
    network = network_of("mlp")
    found = [gradients_by(EngineChoice(name, objective_for(network)), network, Sign(2)) for name in FAST]
    torch.testing.assert_close(found[0], found[1], **TIGHT)


def test_an_engine_that_does_not_exist_is_refused() -> None:
    name: Any = "fast"
    with pytest.raises(
        ConfigError,
        match=r"model\.engine is 'fast', but must be one of auto, learn2learn, native, per_task, vectorized",
    ):
        EngineChoice(name, objective_of("regression"))


@pytest.mark.parametrize("kind", [VectorizedEngine, lambda objective: EngineChoice("auto", objective)])
def test_an_engine_can_be_copied_to_another_process(kind: Any) -> None:
    network, rule = network_of("mlp"), MAML()
    engine = kind(objective_for(network))
    expected = gradients_by(engine, network, rule)[0]
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):  # noqa: S301 - our own bytes
        assert same(gradients_by(other, network, rule)[0], expected)

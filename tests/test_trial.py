"""What is found out of a network before it trains: it is run rightly, or refused, never wrong in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchvision.models import DenseNet

from dmaml_pl import MAML, MetaLearning
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import same, state_of

ENGINES: list[EngineName] = ["auto", "learn2learn", "per_task", "vectorized"]


class Words(nn.Module):
    """Means of embedded words, of which number 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(10, 3, padding_idx=0), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.words(x).mean(1))
        return out


class FunctionalWords(Words):
    """The same, whose modules do not tell of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words.padding_idx = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.embedding(x, self.words.weight, padding_idx=0).mean(1))
        return out


def sentences() -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def samples() -> tuple[Tensor, Tensor]:
        words = torch.randint(0, 10, (3, 4, 5), generator=generator)
        return words, torch.randn(3, 4, 1, generator=generator, dtype=torch.float64)

    return TaskBatch.of(*samples(), *samples())


def by_hand(network: Words, batch: TaskBatch) -> list[Tensor]:
    meta = [p.detach().clone().requires_grad_() for p in network.parameters()]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        words, weight, bias = weights
        return F.mse_loss(F.linear(F.embedding(x, words, padding_idx=0).mean(1), weight, bias), y)

    total = torch.zeros(())
    for task in (batch.task(number) for number in range(batch.tasks)):
        gradients = torch.autograd.grad(loss(meta, task.support_x, task.support_y), meta, create_graph=True)
        adapted = [w - 0.5 * g for w, g in zip(meta, gradients, strict=True)]
        total = total + loss(adapted, task.query_x, task.query_y) / batch.tasks
    return list(torch.autograd.grad(total, meta))


@pytest.mark.parametrize("kind", [Words, FunctionalWords])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_padding_of_an_embedding_does_not_learn_in_any_engine_that_takes_it(
    engine: EngineName, kind: type[Words]
) -> None:
    torch.manual_seed(0)
    network, batch = kind().double(), sentences()
    learner, choice = MetaLearner(network, MAML(inner_lr=0.5)), EngineChoice(engine, objective_of("regression"))
    if engine == "vectorized":
        with pytest.raises(ConfigError, match=r"model\.engine is vectorized, but .*(padding_idx|are not those of)"):
            choice.for_training(learner, batch)
        return
    choice.for_training(learner, batch).meta_gradient(learner, batch)
    found = [p.grad for p in network.parameters() if p.grad is not None]
    torch.testing.assert_close(found, by_hand(network, batch), rtol=1e-9, atol=1e-12)
    assert not bool(found[0][0].any())
    curve = choice.for_evaluation(learner, batch).adaptation_curve(learner, batch, 2).loss
    reference = EngineChoice("per_task", objective_of("regression")).for_evaluation(learner, batch)
    torch.testing.assert_close(curve, reference.adaptation_curve(learner, batch, 2).loss)


class Recomputing(nn.Module):
    """A network that keeps no activations of its first layers."""

    def __init__(self, *, reentrant: bool, modules: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(1, 8), nn.Tanh()), nn.Linear(8, 1)
        self.reentrant = reentrant
        self.modules_too = modules

    def forward(self, x: Tensor) -> Tensor:
        def by_function(x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, *self.first[0].parameters()))

        first: Callable[[Tensor], Tensor] = self.first if self.modules_too else by_function
        x = x.detach().requires_grad_() if self.reentrant else x
        out: Tensor = self.last(checkpoint(first, x, use_reentrant=self.reentrant))
        return out


def points() -> TaskBatch:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 10, 1, generator=generator) for _ in range(2))
    return TaskBatch.of(x, y, x + 1, y)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("modules", [True, False])
def test_a_network_that_recomputes_activations_is_refused_in_one_line(engine: EngineName, modules: bool) -> None:
    torch.manual_seed(0)
    module = MetaLearning(Recomputing(reentrant=False, modules=modules), engine=engine)
    before = state_of(module)
    with pytest.raises(ConfigError) as refused:
        module.engine.for_training(module.learner, points())
    assert "\n" not in str(refused.value)
    if engine != "vectorized":  # where PyTorch may itself refuse
        assert "torch.utils.checkpoint" in str(refused.value)
    assert same(before, state_of(module))


def images() -> TaskBatch:
    x, y = torch.rand(1, 4, 3, 32, 32), torch.tensor([[0, 1, 0, 1]])
    return TaskBatch.of(x, y, x.flip(1), y.flip(1))


@pytest.mark.parametrize("memory_efficient", [True, False])
def test_a_densenet_is_taken_but_where_it_saves_memory_by_recomputing(memory_efficient: bool) -> None:
    torch.manual_seed(0)
    network = DenseNet(
        growth_rate=4,
        block_config=(2, 2),
        num_init_features=4,
        num_classes=2,
        memory_efficient=memory_efficient,
    )
    module = MetaLearning(network, objective="classification", engine="per_task")
    if memory_efficient:
        with pytest.raises(ConfigError, match="memory_efficient of torchvision's DenseNet"):
            module.engine.for_training(module.learner, images())
    else:
        assert module.engine.for_training(module.learner, images()).name == "per_task"


def test_a_network_without_a_second_derivative_is_refused_before_it_trains() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(1, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x).unsqueeze(0).unsqueeze(0)
            mixed = F.scaled_dot_product_attention(hidden, hidden, hidden)
            out: Tensor = self.out(mixed.flatten(0, 2))
            return out

    torch.manual_seed(0)
    module = MetaLearning(Attending())
    with pytest.raises(ConfigError, match=r"No engine can run .*derivative for .*not implemented"):
        module.engine.for_training(module.learner, points())
    first_order = MetaLearning(Attending(), MAML(first_order=True))
    assert first_order.engine.for_training(first_order.learner, points()) is not None


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - torch.tanh(x) ** 2)


class LeavingAutograd(OnceDifferentiable):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = (saved.detach() for saved in ctx.saved_tensors)
        return gradient.detach() * (1 - torch.tanh(x) ** 2)


class Differentiable(OnceDifferentiable):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - torch.tanh(x) ** 2)


class StraightThrough(OnceDifferentiable):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OwnFunction(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(1, 8), nn.Linear(8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function.apply(3 * self.first(x)))
        return out


@pytest.mark.parametrize("engine", ["auto", "learn2learn", "per_task"])
@pytest.mark.parametrize("function", [OnceDifferentiable, LeavingAutograd])
def test_a_function_of_ones_own_whose_gradient_autograd_takes_for_a_constant_is_refused(
    engine: EngineName, function: Any
) -> None:
    torch.manual_seed(0)
    module = MetaLearning(OwnFunction(function), engine=engine)
    with pytest.raises(ConfigError, match=r"second derivative|differentiate twice") as refused:
        module.engine.for_training(module.learner, points())
    if engine == "auto":
        assert str(refused.value).endswith("set model.algorithm.first_order to true.")
    first_order = MetaLearning(OwnFunction(function), MAML(first_order=True), engine=engine)
    assert first_order.engine.for_training(first_order.learner, points()) is not None


@pytest.mark.parametrize("wrapped", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_the_second_derivative_of_pytorchs_weight_norm_is_wrong_and_refused(wrapped: Any) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of the two is on its way out
        network = nn.Sequential(wrapped(nn.Linear(1, 8)), nn.Tanh(), nn.Linear(8, 1))
    module = MetaLearning(network)
    with pytest.raises(
        ConfigError, match=r"second derivative .* weight_norm.*set model\.algorithm\.first_order to true\.$"
    ):
        module.engine.for_training(module.learner, points())


def test_a_network_that_writes_its_weights_is_refused() -> None:
    class Short(Words):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 3, max_norm=0.5)

    for engine in ENGINES:
        learner = MetaLearner(Short().double(), MAML(inner_lr=0.5))
        with pytest.raises(ConfigError, match=r"writes its weights|performance drop"):
            EngineChoice(engine, objective_of("regression")).for_training(learner, sentences())


@pytest.mark.parametrize("function", [Differentiable, StraightThrough])
def test_a_function_of_ones_own_that_can_be_differentiated_twice_is_taken(function: Any) -> None:
    torch.manual_seed(0)
    module = MetaLearning(OwnFunction(function))
    assert module.engine.for_training(module.learner, points()).name == "per_task"


def test_a_network_that_draws_at_random_is_not_taken_for_a_strange_one() -> None:
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    for engine in ENGINES:
        module = MetaLearning(network, engine=engine)
        state = torch.get_rng_state()
        module.engine.for_training(module.learner, points())
        assert torch.equal(torch.get_rng_state(), state)

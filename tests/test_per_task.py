"""The engine that executes tasks one by one, on all threads: the reference's meta-gradients, always the same bits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import MAML, Conv4, MetaLearning
from dmaml_pl.engines import Learn2LearnEngine, PerTaskEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from tests.recipes import same
from tests.test_vectorized import (
    NETWORKS,
    TIGHT,
    Counting,
    WithSpare,
    assert_equals_the_reference,
    assert_judges_and_predicts_as_the_reference,
    batch_for,
    gradients_by,
    made,
    network_of,
    objective_for,
)


def per_task(network: nn.Module, rule: MAML, task_chunk: int | None = None) -> PerTaskEngine:
    return PerTaskEngine(objective_for(network), task_chunk=task_chunk)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_meta_gradient_equals_the_references(
    kind: str, steps: int, first_order: bool, threads: Callable[[int], None]
) -> None:
    threads(2)
    network, rule = network_of(kind), MAML(inner_lr=0.1, inner_steps=steps, first_order=first_order)
    assert_equals_the_reference(network, rule, per_task(network, rule))


def test_the_bits_do_not_depend_on_how_many_threads_there_are(threads: Callable[[int], None]) -> None:
    network, rule = network_of("batch"), MAML(inner_lr=0.1, inner_steps=2)
    found = []
    for number, chunk in ((1, None), (2, None), (2, 2), (2, None)):
        threads(number)
        found.append(gradients_by(per_task(network, rule, chunk), network, rule)[0])
        assert torch.get_num_threads() == number
    assert all(same(gradients, found[0]) for gradients in found)


class Watched(nn.Module):
    """A network that notes the threads and the kind of samples that it was called with."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.inner = Conv4(ways=3, image_size=16, filters=4)
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            SEEN.append((threading.get_ident(), torch.get_num_threads(), x.stride(1)))
            if self.fail:
                raise ArithmeticError("no solution")
        out: Tensor = self.inner(x)
        return out


SEEN: list[tuple[int, int, int]] = []


def test_tasks_are_spread_over_single_threads_and_images_have_their_channels_last(
    threads: Callable[[int], None],
) -> None:
    threads(2)
    SEEN.clear()
    network, rule = made(Watched).double(), MAML()
    learner = MetaLearner(network, rule)
    PerTaskEngine(objective_for(network.inner)).meta_gradient(learner, batch_for(network.inner, tasks=6))
    assert {(number, stride) for _, number, stride in SEEN} == {(1, 1)}
    assert len({ident for ident, *_ in SEEN}) <= 2
    assert len(SEEN) == 12


def test_a_mistake_in_a_thread_is_raised_as_it_is(threads: Callable[[int], None]) -> None:
    threads(2)
    network, rule = made(lambda: Watched(fail=True)).double(), MAML()
    learner = MetaLearner(network, rule)
    with pytest.raises(ArithmeticError, match="no solution"):
        PerTaskEngine(objective_for(network.inner)).meta_gradient(learner, batch_for(network.inner))
    assert torch.get_num_threads() == 2
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("first_order", [False, True])
def test_frozen_and_unused_weights_are_left_alone(first_order: bool) -> None:
    network = made(WithSpare).double()
    network.used.layers[0].weight.requires_grad_(False)
    rule = MAML(inner_lr=0.1, inner_steps=2, first_order=first_order)
    assert_equals_the_reference(network, rule, per_task(network, rule))


def test_the_meta_gradient_is_added_scaled_as_the_caller_asks() -> None:
    network, rule = network_of("batch"), MAML(inner_lr=0.1)
    once = gradients_by(per_task(network, rule), network, rule)[0]
    learner = MetaLearner(network, rule)
    per_task(network, rule).meta_gradient(learner, batch_for(network), lambda loss: (2 * loss).backward())
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, 3 * once[name], **TIGHT)


@pytest.mark.parametrize("kind", ["mlp", "batch"])
def test_tasks_are_judged_and_predicted_as_by_the_reference(kind: str, threads: Callable[[int], None]) -> None:
    threads(2)
    network = network_of(kind)
    assert_judges_and_predicts_as_the_reference(network, per_task(network, MAML(inner_lr=0.1)))


def test_dropout_draws_as_by_the_reference(threads: Callable[[int], None]) -> None:
    threads(2)
    network = made(lambda: nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))).double()
    rule, found = MAML(inner_lr=0.1), []
    for engine in (Learn2LearnEngine(objective_for(network)), per_task(network, rule)):
        gradients_by(engine, network, rule)  # has tried the network
        torch.manual_seed(5)
        found.append(gradients_by(engine, network, rule)[1])
    torch.testing.assert_close(found[0], found[1], **TIGHT)


class Flattening(nn.Module):
    """A network that cannot take images whose channels are last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2 * 14 * 14, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.convolution(x)
        return self.head(out.view(len(out), -1))  # type: ignore[no-any-return]


def test_a_network_that_wants_its_channels_first_gets_them_first() -> None:
    network, rule = made(Flattening).double(), MAML(inner_lr=0.1)
    batch = batch_for(network_of("batch"))
    objective, learner = objective_for(network_of("batch")), MetaLearner(network, rule)
    found = []
    for engine in (Learn2LearnEngine(objective), PerTaskEngine(objective)):
        network.zero_grad()
        engine.meta_gradient(learner, batch)
        found.append({name: p.grad.clone() for name, p in network.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-15)


def test_a_network_that_writes_its_buffers_is_refused_in_one_line_and_left_to_the_reference_by_auto() -> None:
    network = made(lambda: nn.Sequential(Counting(), nn.Unflatten(1, (1, 1)), nn.Conv1d(1, 1, 1), nn.Flatten()))
    module = MetaLearning(network, engine="per_task")
    batch = batch_for(network).map(Tensor.float)
    with pytest.raises(ConfigError, match=r"model\.engine is per_task, but Sequential writes its buffer 0\.calls"):
        module.engine.for_training(module.learner, batch)
    automatic = MetaLearning(copy.deepcopy(network))
    automatic.engine.for_training(automatic.learner, batch)
    assert automatic.engine_in_use == "learn2learn"

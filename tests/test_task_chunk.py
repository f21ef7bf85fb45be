"""`model.task_chunk`: as many tasks in memory as was asked for, and the same meta-gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dmaml_pl import MAML, MetaLearning
from dmaml_pl.engines import EngineChoice, VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP
from tests.recipes import small_data, small_maml, small_trainer, state_of
from tests.test_vectorized import TIGHT, assert_equals_the_reference, batch_for, network_of, objective_for


@pytest.fixture
def metrics_in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("metrics_in_float64")
@pytest.mark.parametrize("task_chunk", [1, 2, 3])
@pytest.mark.parametrize("engine", ["vectorized", "per_task", "auto", "learn2learn"])
@pytest.mark.parametrize("kind", ["mlp", "group"])
def test_the_meta_gradient_of_chunks_equals_the_references(kind: str, engine: Any, task_chunk: int) -> None:
    network, rule = network_of(kind), MAML(inner_lr=0.1, inner_steps=2)
    objective = objective_for(network)
    assert_equals_the_reference(network, rule, EngineChoice(engine, objective, task_chunk=task_chunk))


def test_no_more_tasks_than_a_chunk_are_executed_at_once() -> None:
    sizes: list[int] = []

    network, rule = network_of("mlp"), MAML()
    engine = VectorizedEngine(objective_for(network), task_chunk=2)
    at_once = engine._of_chunk

    def watched(learner: Any, batch: Any, backward: Any, of: Any) -> Any:
        sizes.append(batch.tasks)
        return at_once(learner, batch, backward, of)

    engine._of_chunk = watched  # type: ignore[method-assign]
    learner = MetaLearner(network, rule)
    engine.meta_gradient(learner, batch_for(network, tasks=5))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("kind", ["mlp", "batch"])
def test_chunks_are_judged_and_predicted_as_the_whole(kind: str) -> None:
    network, rule = network_of(kind), MAML(inner_lr=0.1)
    learner = MetaLearner(network, rule)
    batch = batch_for(network, tasks=5)
    choices = (EngineChoice("auto", objective_for(network), task_chunk=size) for size in (None, 2))
    whole, chunks = (choice.for_evaluation(learner, batch) for choice in choices)
    torch.testing.assert_close(
        chunks.adaptation_curve(learner, batch, 2), whole.adaptation_curve(learner, batch, 2), **TIGHT
    )
    torch.testing.assert_close(chunks.predict(learner, batch, 2), whole.predict(learner, batch, 2), **TIGHT)


def test_a_training_in_chunks_goes_the_same_way() -> None:
    states = []
    for task_chunk in (None, 3):
        module = small_maml(task_chunk=task_chunk)
        small_trainer().fit(module, small_data())
        states.append(state_of(module))
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [0, -2])
def test_a_chunk_without_tasks_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.task_chunk is {size}, but must be greater than 0"):
        MetaLearning(MLP(), task_chunk=size)

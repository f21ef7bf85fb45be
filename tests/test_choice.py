"""What `auto` takes: the same at every start, by the work in a task and the length of the training alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from dmaml_pl import ANIL, MAML, Conv4, MetaLearning
from dmaml_pl.engines import EngineChoice, Learn2LearnEngine, VectorizedEngine, choose
from dmaml_pl.engines.work import work_of
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import small_data, small_maml, small_trainer
from tests.test_vectorized import gradients_by, network_of, objective_for


def images(tasks: int, samples: int, size: int = 16) -> TaskBatch:
    y = torch.tensor([0, 1]).repeat(tasks, samples // 2)
    x = torch.rand(tasks, samples, 1, size, size, generator=torch.Generator().manual_seed(0))
    return TaskBatch.of(x, y, x, y)


def points(tasks: int, samples: int = 10) -> TaskBatch:
    x = torch.linspace(-1, 1, samples).reshape(1, samples, 1).repeat(tasks, 1, 1)
    return TaskBatch.of(x, x, x, x)


def smooth(hidden: list[int]) -> nn.Module:
    """A multilayer perceptron that the native engine does not know."""
    return nn.Sequential(MLP(hidden=hidden), nn.ELU())


def chosen(network: nn.Module, batch: TaskBatch, **settings: Any) -> str:
    objective = objective_of("classification" if batch.query_y.ndim == 2 else "regression")
    choice = EngineChoice("auto", objective, **settings)
    learner = MetaLearner(network, MAML(inner_lr=0.1))
    assert choice.for_evaluation(learner, batch).name == choice.for_training(learner, batch).name
    return choice.name(learner)


@pytest.mark.parametrize(
    ("network", "batch", "expected"),
    [
        (lambda: MLP(hidden=[40, 40]), points(25), "vectorized"),
        (lambda: MLP(hidden=[1024, 1024]), points(2), "per_task"),
        (lambda: Conv4(ways=2, image_size=16, filters=8), images(8, 4), "vectorized"),
        (lambda: Conv4(ways=2, image_size=16, filters=64), images(8, 100), "per_task"),
        (lambda: Conv4(ways=2, image_size=16, filters=64).to("meta"), images(8, 100), "vectorized"),
    ],
)
def test_small_operations_are_made_for_all_tasks_at_once_and_large_ones_task_by_task_on_cpus(
    network: Any, batch: TaskBatch, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if next(network().parameters()).is_meta:
        monkeypatch.setattr(VectorizedEngine, "refusal", lambda *given: None)
    assert chosen(network(), batch) == expected


def test_all_tasks_act_at_once_also_where_they_are_trained_one_by_one() -> None:
    choice = EngineChoice("auto", objective_of("regression"))
    learner, batch = MetaLearner(MLP(hidden=[1024, 1024]), MAML(inner_lr=0.1)), points(2)
    choice.for_acting(learner)  # as environments are acted in before there is anything to train on
    assert choice.for_training(learner, batch).name == "per_task"
    assert choice.for_acting(learner).name == "vectorized"
    learner.network.eval()
    assert choice.for_acting(learner).name == "vectorized"
    assert choice.name(learner) == "per_task"


def test_policies_are_trained_at_once_with_larger_operations_than_other_networks() -> None:
    for acts, expected in ((False, "per_task"), (True, "vectorized")):
        choice = EngineChoice("auto", objective_of("regression"))
        learner = MetaLearner(MLP(hidden=[512, 512]), MAML(inner_lr=0.1))
        if acts:
            choice.for_acting(learner)
        assert choice.for_training(learner, points(2)).name == expected


def test_more_queries_can_take_another_engine() -> None:
    network = Conv4(ways=2, image_size=16, filters=64)
    choice, learner = EngineChoice("auto", objective_of("classification")), MetaLearner(network, MAML())
    names = [choice.for_training(learner, images(2, samples)).name for samples in (2, 100, 2)]
    assert names == ["vectorized", "per_task", "vectorized"]


def test_what_does_not_fit_into_memory_at_once_is_executed_task_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, objective = MetaLearner(MLP(), MAML()), objective_of("regression")
    work = work_of(learner, objective, points(1))
    assert work is not None
    monkeypatch.setattr(choose, "MOST_ELEMENTS", 4 * work.elements)
    names = [
        EngineChoice("auto", objective, task_chunk=chunk).for_training(learner, points(tasks)).name
        for tasks, chunk in ((4, None), (5, None), (5, 4))
    ]
    assert names == ["vectorized", "per_task", "vectorized"]


def test_the_work_of_a_task_is_the_same_at_every_start_whatever_the_threads() -> None:
    found = set()
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        learner = MetaLearner(Conv4(ways=2, image_size=16, filters=4), MAML())
        found.add(work_of(learner, objective_of("classification"), images(3, 2)))
    torch.set_num_threads(before)
    assert len(found) == 1


def test_counting_the_work_leaves_weights_gradients_and_random_numbers_alone() -> None:
    network = nn.Sequential(MLP(hidden=[8]), nn.Dropout(0.5))
    learner, state = MetaLearner(network, MAML()), torch.get_rng_state()
    before = [p.detach().clone() for p in network.parameters()]
    work_of(learner, objective_of("regression"), points(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_a_body_that_does_not_adapt_is_less_work() -> None:
    work = []
    for algorithm in (MAML(), ANIL()):
        learner = MetaLearner(Conv4(ways=2, image_size=16, filters=8), algorithm)
        work.append(work_of(learner, objective_of("classification"), images(1, 4)))
    assert work[0] is not None
    assert work[1] is not None
    assert work[1].elements < work[0].elements / 2


@pytest.mark.parametrize("limit", [0, 10**9])
def test_whatever_is_taken_gives_the_references_meta_gradient_and_curve(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "LARGE_OPERATION", limit)
    network, rule = network_of("group"), MAML(inner_lr=0.1)
    objective, batch = (
        objective_for(network),
        images(3, 4).map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor),
    )
    learner = MetaLearner(network, rule)
    choice, reference = EngineChoice("auto", objective), Learn2LearnEngine(objective)
    assert choice.for_training(learner, batch).name == ("vectorized" if limit else "per_task")
    curves = [
        engine.adaptation_curve(learner, batch, 2) for engine in (choice.for_evaluation(learner, batch), reference)
    ]
    torch.testing.assert_close(curves[0].loss, curves[1].loss, rtol=1e-9, atol=1e-12)
    ours, theirs = (gradients_by(engine, network, rule)[0] for engine in (choice, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("meta_iterations", "compiled", "expected"),
    [
        (None, "auto", "vectorized"),
        (1_000, "auto", "vectorized"),
        (70_000, "auto", "compiled vectorized"),
        (float("inf"), "auto", "compiled vectorized"),
        (1, True, "compiled vectorized"),
        (70_000, False, "vectorized"),
    ],
)
def test_compiling_is_for_trainings_that_are_long_enough_unless_it_is_set(
    meta_iterations: float | None, compiled: Any, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    choice = EngineChoice("auto", objective_of("regression"), compiled=compiled)
    choice.meta_iterations = meta_iterations
    learner = MetaLearner(smooth([40, 40]), MAML())
    with caplog.at_level(logging.INFO):
        names = [choice.for_training(learner, points(25)).name for _ in range(2)]
    assert names == [expected] * 2
    said = [record.message for record in caplog.records if "model.compile" in record.message]
    assert len(said) == (1 if compiled == "auto" and "compiled" in expected else 0)


@pytest.mark.parametrize(
    ("meta_iterations", "compiled", "expected"),
    [(10, "auto", "per_task"), (60_000, "auto", "compiled vectorized"), (None, True, "compiled vectorized")],
)
def test_what_is_executed_task_by_task_is_compiled_for_all_tasks_where_that_pays_or_is_asked_for(
    meta_iterations: float | None, compiled: Any, expected: str
) -> None:
    choice = EngineChoice("auto", objective_of("regression"), compiled=compiled)
    choice.meta_iterations = meta_iterations
    learner = MetaLearner(MLP(hidden=[1024, 1024]), MAML())
    assert choice.for_training(learner, points(2)).name == expected


def test_the_larger_a_network_the_shorter_a_training_that_is_compiled() -> None:
    def shortest(hidden: list[int]) -> int:
        """To a power of two."""
        learner, batch = MetaLearner(smooth(hidden), MAML()), points(25)
        lengths = [1 << power for power in range(20)]
        for length in lengths:
            choice = EngineChoice("auto", objective_of("regression"), compiled="auto")
            choice.meta_iterations = length
            if choice.for_training(learner, batch).name == "compiled vectorized":
                return length
        raise AssertionError(hidden)

    assert shortest([40, 40]) > shortest([256, 256]) > shortest([1024, 1024])


def test_a_graph_for_all_tasks_that_do_not_fit_into_memory_at_once_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "MOST_ELEMENTS", 0)
    choice = EngineChoice("auto", objective_of("regression"), compiled="auto")
    choice.meta_iterations = float("inf")
    assert choice.for_training(MetaLearner(smooth([40, 40]), MAML()), points(25)).name == "per_task"


def test_convolutions_are_never_compiled_on_cpus_by_auto() -> None:
    choice = EngineChoice("auto", objective_of("classification"), compiled="auto")
    choice.meta_iterations = float("inf")
    learner = MetaLearner(Conv4(ways=2, image_size=16, filters=4), MAML())
    assert "compiled" not in choice.for_training(learner, images(4, 2)).name


def test_a_training_is_taken_for_as_long_as_its_settings_say() -> None:
    module, lengths = small_maml(run_length=5), []
    for settings in ({"max_steps": 7}, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 1}):
        trainer = small_trainer(**settings)
        trainer.fit(module, small_data(runs_per_epoch=1))
        lengths.append(module.engine.meta_iterations)
        assert module.engine_in_use == "vectorized"
    assert lengths == [7, 10]


def test_what_a_training_takes_is_known_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task would fit into memory at once, and the meta-batch does not."""
    work = work_of(MetaLearner(MLP(hidden=[8, 8]), MAML()), objective_of("regression"), points(1))
    assert work is not None
    monkeypatch.setattr(choose, "MOST_ELEMENTS", 2 * work.elements)
    module = small_maml()
    small_trainer(max_steps=1).fit(module, small_data())
    assert module.engine_in_use == "per_task"
    module.check_task(small_data().evaluation_task("val", 0), meta_batch=4)
    assert module.engine_in_use == "per_task"


def test_a_setting_of_compile_that_does_not_exist_is_refused() -> None:
    wrong: Any = "often"
    with pytest.raises(ConfigError, match=r"model\.compile is 'often', but must be true, false or auto\."):
        MetaLearning(MLP(), compile=wrong)

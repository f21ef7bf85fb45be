"""What the inner loop is given and gives: supports of each step, networks that act, closures, constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from data_modules import Sinusoid
from dmaml_pl import MAML, MLP, MetaLearning
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective, Regression, objective_of
from dmaml_pl.tasks import Act, TaskBatch, check_tasks
from tests.recipes import same, small_data, small_maml, small_trainer, state_of

ENGINES: list[EngineName] = ["learn2learn", "per_task", "vectorized"]
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def learner_of(steps: int) -> MetaLearner:
    torch.manual_seed(0)
    return MetaLearner(MLP(hidden=[8]).double(), MAML(inner_lr=0.05, inner_steps=steps))


def batch_of(number: int = 0) -> TaskBatch:
    return Sinusoid(meta_batch=3, seed=0).sample(worker=0, run=0, iteration=number).map(Tensor.double)


def gradients(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: w.grad.clone() for name, w in learner.meta().items() if w.grad is not None}


@pytest.mark.parametrize("engine", ["per_task", "vectorized"])
def test_every_step_adapts_to_its_own_support_set_and_further_steps_to_the_last(engine: EngineName) -> None:
    batch = batch_of()._replace(support=(*batch_of(1).support, *batch_of(2).support))
    learner, choice = learner_of(3), EngineChoice(engine, objective_of("regression"))
    choice.for_training(learner, batch).meta_gradient(learner, batch)
    meta = {name: w.detach().clone().requires_grad_() for name, w in learner.meta().items()}
    total = torch.zeros((), dtype=torch.float64)
    for task in (batch.task(number) for number in range(batch.tasks)):
        weights = dict(meta)
        for support in (task.support[0], task.support[1], task.support[1]):
            loss = F.mse_loss(functional_call(learner.network, weights, (support.x,)), support.y)  # type: ignore[arg-type]
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - 0.05 * g for (name, w), g in zip(weights.items(), found, strict=True)}
        total = (
            total + F.mse_loss(functional_call(learner.network, weights, (task.query_x,)), task.query_y) / batch.tasks
        )
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    torch.testing.assert_close(gradients(learner), expected, **TIGHT)


def test_a_batch_of_other_tensors_has_them_in_the_order_in_which_it_gave_them() -> None:
    batch = batch_of()._replace(numbers=torch.arange(3), ways=2)
    other = batch.with_tensors([tensor + 1 for tensor in batch.tensors()])
    assert torch.equal(other.query_y, batch.query_y + 1)
    assert other.numbers is not None
    assert torch.equal(other.numbers, torch.arange(1, 4))
    assert other.ways == 2


def test_learn2learn_refuses_more_than_one_support_set_in_one_line() -> None:
    batch = batch_of()._replace(support=(*batch_of(1).support, *batch_of(2).support))
    with pytest.raises(ConfigError, match="learn2learn takes one support set"):
        EngineChoice("learn2learn", objective_of("regression")).for_training(learner_of(2), batch)


def test_axes_that_do_not_agree_are_named_with_their_support_set() -> None:
    first, second = batch_of(1).support[0], batch_of(2).support[0]
    short = second._replace(x=second.x[:, :4])
    with pytest.raises(DataError, match=r"support\[1\]_x has shape \(3, 4, 1\)"):
        check_tasks(batch_of()._replace(support=(first, short)))


@pytest.mark.parametrize("engine", ENGINES)
def test_networks_act_as_they_predict_after_as_many_steps_as_there_are_support_sets(engine: EngineName) -> None:
    learner, batch = learner_of(1), batch_of()
    executing = EngineChoice(engine, objective_of("regression")).for_evaluation(learner, batch)
    expected = executing.predict(learner, batch, 1)
    for supports in ((), batch.support):
        outputs = executing.act(learner, supports)
        torch.testing.assert_close(outputs(batch.query_x), expected[:, len(supports)], **TIGHT)
        again = outputs(batch.query_x[:, :2])
        assert not again.requires_grad
        torch.testing.assert_close(again, expected[:, len(supports), :2], **TIGHT)


class Acting(Sinusoid):
    """Tasks whose targets depend on what the adapted networks say."""

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> TaskBatch:
        assert act is not None
        batch = super().sample(worker=worker, run=run, iteration=iteration)
        before, after = act(())(batch.query_x), act(batch.support)(batch.query_x)
        assert not torch.equal(before, after)
        return batch._replace(query=batch.query._replace(y=2 * after - before))


def test_a_training_on_tasks_that_depend_on_the_networks_is_the_same_whatever_the_engine() -> None:
    states = []
    for engine in ENGINES:
        module = small_maml(engine=engine, inner_lr=0.05)
        small_trainer(max_steps=6).fit(module, Acting(meta_batch=3, val_tasks=4, test_tasks=4, seed=0))
        states.append(state_of(module))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-5)


class Counted(torch.optim.LBFGS):
    """An optimizer that evaluates more than once a step, and counts it."""

    evaluations = 0

    def step(self, closure: Callable[..., Any]) -> Any:  # type: ignore[override]
        def counted() -> Any:
            Counted.evaluations += 1
            return closure()

        return super().step(counted)  # type: ignore[no-untyped-call]  # PyTorch's to type


def test_an_optimizer_that_evaluates_more_than_once_a_step_gets_meta_gradients_at_the_weights_as_they_are() -> None:
    Counted.evaluations = 0
    module = small_maml(meta_optimizer=lambda params: Counted(params, lr=0.1, max_iter=4), run_length=5)
    trainer = small_trainer(max_steps=10)
    trainer.fit(module, small_data(meta_batch=10))
    assert trainer.global_step == 10
    assert 20 < Counted.evaluations <= 50
    batch = small_data(meta_batch=10).sample(worker=0, run=0, iteration=0)
    loss, before = (
        each.engine.for_training(each.learner, batch).meta_gradient(each.learner, batch).loss
        for each in (module, small_maml())
    )
    assert loss < before


class Bounded(Regression):
    """A regression whose outer steps are not to make outputs large."""

    def constraint(self, output: Tensor, y: Tensor) -> Tensor:
        return output.square().mean()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_closure_gives_the_constraint_and_its_gradient_after_adaptation(engine: EngineName) -> None:
    seen: list[dict[str, Tensor]] = []
    told: list[float] = []

    class Asking(torch.optim.SGD):
        def step(self, closure: Callable[..., Any]) -> Any:  # type: ignore[override]
            told.append(float(closure("constraint")))
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])  # type: ignore[arg-type]
            closure()
            return super().step()

    torch.manual_seed(0)
    module = MetaLearning(MLP(hidden=[8]), MAML(inner_lr=0.05), Bounded(), engine=engine, run_length=1)
    module.meta_optimizer = lambda params: Asking(params, lr=1e-9)
    data = small_data(meta_batch=3)
    batch = data.sample(worker=0, run=0, iteration=0)
    small_trainer(max_steps=1).fit(module, data)
    meta = {name: p.detach().clone().requires_grad_() for name, p in module.network.named_parameters()}
    total = torch.zeros(())
    for task in (batch.task(number) for number in range(batch.tasks)):
        loss = F.mse_loss(functional_call(module.network, meta, (task.support_x,)), task.support_y)
        found = torch.autograd.grad(loss, list(meta.values()), create_graph=True)
        adapted = {name: w - 0.05 * g for (name, w), g in zip(meta.items(), found, strict=True)}
        total = total + functional_call(module.network, adapted, (task.query_x,)).square().mean() / batch.tasks
    # The step before the last was the check's, before the training.
    assert told[-1] == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(seen[-1], list(torch.autograd.grad(total, list(meta.values()))), rtol=1e-4, atol=1e-6)


def test_an_objective_without_a_constraint_says_so_where_it_is_asked_for() -> None:
    objective: Objective = objective_of("regression")
    with pytest.raises(ConfigError, match="has no constraint for model"):
        objective.constraint(torch.zeros(1), torch.zeros(1))


class Quantile(Objective):
    """A user's own objective: a loss for the support set, another for the query set, and a metric that is neither."""

    name, metric, title, better = "quantile", "within", "share within one", "max"

    def support_loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y)

    def query_loss(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(0.9 * (y - output), 0.1 * (output - y)).mean()

    def measure(self, output: Tensor, y: Tensor) -> Tensor:
        return ((output - y).abs() < 1).to(output.dtype).mean()


def test_an_own_objective_with_two_losses_trains_alike_in_every_engine_and_its_metric_is_logged() -> None:
    states = []
    for engine in ENGINES:
        module = small_maml(objective=Quantile(), engine=engine, inner_lr=0.05)
        trainer = small_trainer(limit_val_batches=1.0, val_check_interval=1)
        trainer.fit(module, small_data())
        states.append(state_of(module))
        assert 0 <= float(trainer.callback_metrics["val/within"]) <= 1
    assert not same(states[0], state_of(small_maml()))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-5)

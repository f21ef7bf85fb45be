"""Meta-tests of policies: the baseline beside the meta-trained one, the report and its figures."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dmaml_pl import DMAMLStrategy
from dmaml_pl.evaluation.policy_baseline import STEP_SIZES, PolicyBaseline, PolicyBaselineTraining
from tests.policies import small_navigation, small_policy
from tests.recipes import same, small_trainer, state_of
from tests.workers import in_workers

# -- the baseline --------------------------------------------------------------------------------------------------


class Making(pl.Callback):
    """Makes the baseline where a meta-test does."""

    def __init__(self, env_steps: int) -> None:
        self.env_steps = env_steps
        self.told: list[tuple[int, float]] = []

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        training = PolicyBaselineTraining(pl_module, trainer.datamodule, trainer.strategy)
        pl_module.baseline = training.make(self.env_steps, 2, lambda *told: self.told.append(told))


def baseline_of(env_steps: int = 600, **settings: Any) -> tuple[PolicyBaseline, Making, Any]:
    module, data, making = small_policy(**settings), small_navigation(), Making(env_steps)
    small_trainer(strategy=DMAMLStrategy(), callbacks=[making]).test(module, data, verbose=False)
    assert isinstance(module.baseline, PolicyBaseline)
    return module.baseline, making, module


def test_the_baseline_follows_from_the_seed_alone_and_leaves_everything_else_as_it_was() -> None:
    before, found = state_of(small_policy().network), []
    for noise in (0, 5):
        module, data, making = small_policy(), small_navigation(), Making(600)
        trainer = small_trainer(strategy=DMAMLStrategy(), callbacks=[making])
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        trainer.test(module, data, verbose=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(state_of(module.network), before)
        assert module.baseline is not None
        assert module.meta_test is not None
        found.append((module.baseline, module.meta_test.metrics["baseline"]))
    (first, returns), (second, others) = found
    assert same(state_of(first.learner.network), state_of(second.learner.network))
    assert first.step_size == second.step_size
    assert torch.equal(returns, others)


def test_it_is_trained_without_adaptation_until_its_steps_in_environments_are_used_up() -> None:
    baseline, making, module = baseline_of(600)
    assert (baseline.steps, baseline.samples) == (5, 600)  # of 3 tasks, 4 rollouts and 10 steps each
    assert [done for done, _ in making.told] == [120, 240, 360, 480, 600]
    assert baseline.step_size in STEP_SIZES
    assert not same(state_of(baseline.learner.network), state_of(module.untrained.network))
    assert (baseline.learner.algorithm.steps, module.untrained.algorithm.steps) == (2, 1)


def test_it_comes_to_a_better_return_before_adaptation() -> None:
    goals = small_navigation(half_width=0.1, rollouts=20, meta_batch=10, test_tasks=10)
    module = small_policy()
    small_trainer(callbacks=[Making(40_000)]).test(module, goals, verbose=False)
    assert module.meta_test is not None
    trained, untrained = (module.meta_test.metrics[name][:, 0].mean() for name in ("baseline", "untrained"))
    assert float(trained) > float(untrained) + 0.1


def test_it_is_trained_by_the_same_meta_optimizer() -> None:
    trusted, _, _ = baseline_of(240)
    plain, _, _ = baseline_of(240, meta_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert not same(state_of(trusted.learner.network), state_of(plain.learner.network))


def _baseline_of_two() -> tuple[dict[str, Tensor], float, int, list[tuple[int, float]]]:
    module, making = small_policy(), Making(960)
    trainer = small_trainer(devices=2, strategy=DMAMLStrategy(), callbacks=[making])
    trainer.test(module, small_navigation(), verbose=False)
    assert module.baseline is not None
    return state_of(module.baseline.learner.network), module.baseline.step_size, module.baseline.samples, making.told


def test_workers_share_the_training_of_the_baseline_and_come_to_the_same_policy() -> None:
    (first, size, seen, told), (second, other, also_seen, also_told) = in_workers(_baseline_of_two, 2)
    assert same(first, second)
    assert size == other
    assert seen == also_seen == 960
    assert told == also_told
    assert len(told) == 4  # steps of 240 in environments

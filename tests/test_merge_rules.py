"""Merge rules: equal the reference, deterministic, converge, keep their property; between real workers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import DMAMLStrategy, MeanMerge, OuterOptimizerMerge, TaskWeightedMerge, ValidationWeightedMerge
from dmaml_pl.strategies import MergeRule
from tests.recipes import Recorder, same, small_data, small_maml, small_trainer, state_of
from tests.workers import in_workers

SGD, Adam = torch.optim.SGD, torch.optim.Adam


def nesterov() -> OuterOptimizerMerge:
    return OuterOptimizerMerge()


def adam() -> OuterOptimizerMerge:
    return OuterOptimizerMerge(lambda params: Adam(params, lr=0.1))


def runs(seed: int = 0, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Starts and means of runs, as vectors."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(7, generator=generator), torch.randn(7, generator=generator)) for _ in range(count)]


def follow(rule: MergeRule, ways: list[Tensor], start: Tensor) -> list[Tensor]:
    """The meta-weights after each run, of which every one starts from the last and goes a given way."""
    weights = [start]
    for way in ways:
        weights.append(rule.merge(weights[-1], weights[-1] + way))
    return weights[1:]


def test_sgd_with_lr_1_equals_the_plain_mean_exactly() -> None:
    rule = OuterOptimizerMerge(lambda params: SGD(params, lr=1.0))
    for start, mean in runs():
        assert torch.equal(rule.merge(start, mean), mean)


def test_nesterov_equals_the_formula_of_diloco() -> None:
    ways = [way for _, way in runs()]
    start, momentum, expected = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), []
    for way in ways:
        gradient = -way.double()
        momentum = 0.9 * momentum + gradient
        start = start - 0.7 * (gradient + 0.9 * momentum)
        expected.append(start)
    found = follow(nesterov(), [way.double() for way in ways], torch.zeros(7, dtype=torch.float64))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_adam_equals_adam_on_the_pseudo_gradient() -> None:
    weights = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = Adam([weights], lr=0.1)
    ways = [way.double() for _, way in runs()]
    found = follow(adam(), ways, torch.zeros(7, dtype=torch.float64))
    for way, merged in zip(ways, found, strict=True):
        weights.grad = -way
        optimizer.step()
        assert torch.allclose(merged, weights.detach(), rtol=1e-12)


@pytest.mark.parametrize("make", [MeanMerge, TaskWeightedMerge, ValidationWeightedMerge, nesterov, adam])
def test_the_same_runs_give_the_same_bits(make: Any) -> None:
    first, second = make(), make()
    for start, mean in runs():
        assert torch.equal(first.merge(start, mean), second.merge(start, mean))


@pytest.mark.parametrize("make", [MeanMerge, TaskWeightedMerge, ValidationWeightedMerge, nesterov, adam])
def test_workers_that_go_towards_a_goal_arrive_there(make: Any) -> None:
    rule, goal = make(), torch.tensor([3.0, -2.0, 0.5])
    weights = torch.zeros(3)
    for _ in range(200):
        weights = rule.merge(weights, weights + 0.3 * (goal - weights))
    assert torch.allclose(weights, goal, atol=0.05)


@pytest.mark.parametrize("make", [MeanMerge, TaskWeightedMerge, ValidationWeightedMerge, nesterov])
def test_where_no_worker_moves_nothing_moves(make: Any) -> None:
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make().merge(weights, weights), weights)


@pytest.mark.parametrize("make", [nesterov, adam])
def test_a_restored_rule_goes_on_to_the_bit(make: Any) -> None:
    whole, first, second = make(), make(), make()
    pairs = runs(count=6)
    expected = [whole.merge(*pair) for pair in pairs]
    for pair in pairs[:3]:
        first.merge(*pair)
    second.load_state_dict(first.state_dict())
    for pair, wanted in zip(pairs[3:], expected[3:], strict=True):
        assert torch.equal(second.merge(*pair), wanted)


def test_a_worker_counts_by_the_tasks_it_saw() -> None:
    assert TaskWeightedMerge().weight({"tasks": 12, "share": 1.0}) == 12.0
    assert MeanMerge().weight({"tasks": 12, "share": 1.0}) == 1.0


def _train(rule: Any, folder: Path, stop: int, ckpt: Path | None = None) -> Any:
    torch.set_num_threads(1)
    module, recorder = small_maml(), Recorder()
    strategy = DMAMLStrategy(run_length=3, merge=rule())
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=stop, callbacks=[recorder])
    trainer.fit(module, small_data(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{stop}.ckpt")
    if ckpt is None and stop == 6:
        torch.distributed.destroy_process_group()
        return _train(rule, folder, 15, folder / "6.ckpt")
    return recorder.states


@pytest.mark.parametrize("rule", [TaskWeightedMerge, nesterov, adam])
def test_between_workers_a_rule_gives_both_the_same_bits_and_resumes_exactly(rule: Any, tmp_path: Path) -> None:
    first, second = in_workers(_train, 2, rule, tmp_path, 15)
    for mine, others in zip(first, second, strict=True):
        assert same(mine, others)
    resumed, _ = in_workers(_train, 2, rule, tmp_path, 6)
    assert same(resumed[-1], first[-1])


def test_between_workers_weighting_equal_numbers_of_tasks_is_the_plain_mean(tmp_path: Path) -> None:
    plain, _ = in_workers(_train, 2, MeanMerge, tmp_path, 9)
    weighted, _ = in_workers(_train, 2, TaskWeightedMerge, tmp_path, 9)
    for name, value in plain[-1].items():
        assert torch.allclose(weighted[-1][name], value, atol=1e-6), name


def _alone(rule: MergeRule | None) -> dict[str, Tensor]:
    module = small_maml()
    small_trainer(strategy=DMAMLStrategy(run_length=3, merge=rule)).fit(module, small_data())
    return state_of(module)


def test_an_outer_optimizer_acts_on_a_single_worker_and_sgd_with_lr_1_leaves_it_alone() -> None:
    plain = _alone(None)
    assert same(plain, _alone(OuterOptimizerMerge(lambda params: SGD(params, lr=1.0))))
    assert not same(plain, _alone(nesterov()))

"""What a merge does beside the mean, between real processes, held against the same written out in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmaml_pl import DMAMLStrategy, TaskParallelStrategy, ValidationWeightedMerge
from dmaml_pl.data import TrainingRuns
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.strategies.exchange import Exchange
from dmaml_pl.tasks import Act
from tests.by_hand import ByHand, weights_of
from tests.recipes import Recorder, same, small_data, small_maml, small_trainer, state_of
from tests.test_dmaml import PoisonedData
from tests.workers import in_workers


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def adam(params: Any) -> Any:
    return torch.optim.Adam(params, lr=1e-2)


def _train(strategy: Callable[[], Any], stop: int = 12, workers: int = 2, **settings: Any) -> Recorder:
    torch.set_num_threads(1)
    recorder = Recorder()
    module = small_maml(meta_optimizer=adam)
    trainer = small_trainer(
        devices=workers,
        strategy=strategy(),
        max_steps=stop,
        callbacks=[recorder],
        **{"limit_val_batches": 0} | settings,
    )
    trainer.fit(module, small_data())
    return recorder


def _states(strategy: Callable[[], Any], **settings: Any) -> tuple[list[Any], list[Any]]:
    recorder = _train(strategy, **settings)
    return recorder.states, recorder.reports


def _same_states(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(same, first, second))


# -- moments -----------------------------------------------------------------------------------------------------------


def keep() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="keep")


def average() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="average")


def reset() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="reset")


@pytest.mark.parametrize("strategy", [keep, average, reset])
def test_moments_are_kept_averaged_or_reset_as_written_out_by_hand(strategy: Any) -> None:
    (states, _), (others, _) = in_workers(_states, 2, strategy)
    reference = ByHand(2, adam)
    for run, state in enumerate(states):
        reference.run(run, 3)
        reference.merge()
        if strategy is average:
            reference.average_moments()
        elif strategy is reset:
            reference.reset_moments()
        assert close(weights_of(state), reference.weights[0]), run
    assert _same_states(states, others)


# -- lower precision ---------------------------------------------------------------------------------------------------


def bfloat16() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="keep", transfer_dtype="bfloat16")


def test_bfloat16_is_as_precise_as_the_displacement_needs_and_keeps_the_workers_alike() -> None:
    (states, _), (others, _) = in_workers(_states, 2, bfloat16)
    (plain, _), _ = in_workers(_states, 2, keep)
    assert _same_states(states, others)
    displacement = weights_of(plain[0]) - torch.cat([p.detach().reshape(-1) for p in small_maml().parameters()])
    error = weights_of(states[0]) - weights_of(plain[0])
    assert 0 < float(error.norm()) < 2**-7 * float(displacement.norm())


def test_bfloat16_carries_metrics_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, generator=generator) * 10 ** torch.linspace(-6, 8, 200)
    displacement, exchange = torch.ones(7), Exchange(exclude=False, bfloat16=True)
    idle = exchange._encode(torch.zeros(7), torch.zeros_like(exact))
    total, carried = exchange._decode(exchange._encode(3 * displacement, exact) + idle, displacement)
    assert torch.equal(carried, exact)
    assert torch.equal(total, 3 * displacement)


# -- weights by validation ---------------------------------------------------------------------------------------------


def by_validation() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="keep", merge=ValidationWeightedMerge(tasks=5, power=3.0))


def test_weights_by_validation_loss_are_those_written_out_by_hand_and_the_same_every_time() -> None:
    (states, _), (others, _) = in_workers(_states, 2, by_validation)
    (again, _), _ = in_workers(_states, 2, by_validation)
    assert _same_states(states, others)
    assert _same_states(states, again)
    reference = ByHand(2, adam)
    tasks = range(reference.data.val_tasks, reference.data.val_tasks + 5)
    plain = []
    for run, state in enumerate(states):
        reference.run(run, 3)
        plain.append(reference.weights.mean(dim=0))
        reference.merge([1 / loss**3 for loss in reference.losses(tasks)])
        assert close(weights_of(state), reference.weights[0]), run
    assert not close(weights_of(states[0]), plain[0])


@pytest.mark.parametrize("strategy", [by_validation, average, reset])
def test_the_training_loss_falls_with_each_kind_of_merge(strategy: Any) -> None:
    (_, reports), _ = in_workers(_trained_for_long, 2, strategy)
    losses = torch.cat([report["series"]["loss"] for report in reports])
    assert float(losses[-100:].mean()) < 0.8 * float(losses[:50].mean())


def _trained_for_long(strategy: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    def long_runs() -> Any:
        made = strategy()
        made.run_length = 20
        return made

    return _states(long_runs, stop=500)


def test_a_better_worker_counts_more_and_power_0_is_the_plain_mean() -> None:
    def weight(loss: float, power: float) -> float:
        return ValidationWeightedMerge(power=power).weight({"share": 1.0, "validation_loss": loss})

    assert weight(0.5, 2.0) == 4 * weight(1.0, 2.0)
    assert weight(0.5, 0.0) == weight(7.0, 0.0) == 1.0
    assert weight(0.0, 1.0) < float("inf")


def test_weights_by_validation_need_a_data_module() -> None:
    with pytest.raises(ConfigError, match=r"trainer.strategy.merge .* needs a data module"):
        small_trainer(strategy=by_validation()).fit(small_maml(), TrainingRuns(small_data(), 5))


def test_settings_of_the_validation_weights_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"trainer.strategy.merge.tasks is 0"):
        ValidationWeightedMerge(tasks=0)
    with pytest.raises(ConfigError, match=r"trainer.strategy.merge.tasks is 1000000, but must be at most 10,000"):
        ValidationWeightedMerge(tasks=10**6)
    with pytest.raises(ConfigError, match=r"trainer.strategy.merge.power is -1"):
        ValidationWeightedMerge(power=-1)


# -- overlap -----------------------------------------------------------------------------------------------------------


def overlapping() -> DMAMLStrategy:
    return DMAMLStrategy(run_length=3, moments="keep", overlap=True)


def _overlapped(folder: Path) -> Any:
    torch.set_num_threads(1)
    recorder = Recorder()
    module = small_maml(meta_optimizer=adam)
    logged: list[Any] = []
    module.log_merged_run = logged.append  # type: ignore[method-assign, assignment]
    trainer = small_trainer(devices=2, strategy=overlapping(), max_steps=12, callbacks=[recorder])
    trainer.fit(module, small_data())
    trainer.save_checkpoint(folder / f"{trainer.global_rank}.ckpt")
    end = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    return recorder.states, [*recorder.reports, *logged], end


def test_overlapping_merges_equal_delayed_averaging_by_hand_and_end_merged(tmp_path: Path) -> None:
    (states, reports, end), (others, _, other_end) = in_workers(_overlapped, 2, tmp_path)
    reference = ByHand(2, adam)
    sent: torch.Tensor = torch.empty(0)
    for run in range(4):
        reference.run(run, 3)
        if run:
            reference.weights = reference.weights + (sent.mean(dim=0) - sent)
        sent = reference.weights
        assert close(weights_of(states[run]), sent[0]), run
        assert close(weights_of(others[run]), sent[1]), run
    assert close(end, sent.mean(dim=0))
    assert torch.equal(end, other_end)
    assert [report["end"] for report in reports if "series" in report] == [3, 6, 9, 12]
    assert reports[1]["workers"]["loss"].shape == (2, 3)


def _stopped_after_a_validation(folder: Path, stop: int, ckpt: Path | None = None) -> Any:
    torch.set_num_threads(1)
    module = small_maml(meta_optimizer=adam)
    often = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = small_trainer(devices=2, strategy=overlapping(), max_steps=stop, **often)
    trainer.fit(module, small_data(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{stop}.ckpt")
    return state_of(module)


def test_overlapping_merges_resume_from_a_validation_to_the_bit(tmp_path: Path) -> None:
    straight, _ = in_workers(_stopped_after_a_validation, 2, tmp_path, 18)
    in_workers(_stopped_after_a_validation, 2, tmp_path, 6)
    resumed, other = in_workers(_stopped_after_a_validation, 2, tmp_path, 18, tmp_path / "6.ckpt")
    assert same(resumed, straight)
    assert same(resumed, other)


def _validated(strategy: Callable[[], Any]) -> Any:
    recorder = _train(strategy, stop=9, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    return recorder.states


def test_a_validation_after_every_run_makes_overlapping_merges_plain_ones() -> None:
    class Strict(DMAMLStrategy):
        """Takes note of the weights that a validation sees."""

        def on_validation_start(self) -> None:
            super().on_validation_start()
            seen.append(torch.cat([p.detach().reshape(-1) for p in self._module().parameters()]))

    seen: list[Any] = []

    def strict(overlap: bool) -> Any:
        seen.clear()
        _validated(lambda: Strict(run_length=3, moments="keep", overlap=overlap))
        return list(seen)

    (first, second), (plain, _) = in_workers(strict, 2, True), in_workers(strict, 2, False)
    assert len(first) == 3
    for mine, others, plainly in zip(first, second, plain, strict=True):
        assert torch.equal(mine, others)
        assert torch.equal(mine, plainly)


def test_settings_that_do_not_go_with_overlap_are_named() -> None:
    with pytest.raises(ConfigError, match=r"trainer.strategy.overlap is true and trainer.strategy.moments is reset"):
        DMAMLStrategy(overlap=True, moments="reset")


# -- uneven runs -------------------------------------------------------------------------------------------------------


class SlowData:
    """Worker 1 makes one meta-iteration a run, worker 0 three: time stands still until a task is drawn."""

    def __init__(self, clock: list[float]) -> None:
        self.data = small_data()
        self.seed = 0
        self.clock = clock

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> Any:
        if iteration == 0:
            self.clock[0] = 0.0
        self.clock[0] += 1.0 if worker else 0.34
        return self.data.sample(worker=worker, run=run, iteration=iteration)


def _uneven(stop: int) -> Any:
    from dmaml_pl import runs

    torch.set_num_threads(1)
    clock, recorder = [0.0], Recorder()
    runs.RunClock.seconds = lambda self: clock[0]  # type: ignore[method-assign]
    module = small_maml(meta_optimizer=adam)
    trainer = small_trainer(
        devices=2, strategy=DMAMLStrategy(run_seconds=1.0, moments="keep"), max_steps=stop, callbacks=[recorder]
    )
    trainer.fit(module, TrainingRuns(SlowData(clock), 50))
    return recorder.states, recorder.reports, trainer.global_step, module.tasks_seen


def test_runs_of_a_given_time_merge_by_the_meta_iterations_that_each_worker_made() -> None:
    (states, reports, steps, tasks), (others, _, other_steps, other_tasks) = in_workers(_uneven, 2, 5)
    assert _same_states(states, others)
    reference = ByHand(2, adam)
    for run, lengths in enumerate([(3, 1), (3, 1)]):
        reference.run(run, lengths)
        reference.merge(lengths)
        assert close(weights_of(states[run]), reference.weights[0]), run
    assert [report["iterations"] for report in reports] == [2, 2, 1]
    assert reports[0]["tasks"] == 4 * (3 + 1)
    assert reports[0]["workers"]["loss"].shape == (2, 1)
    assert tasks == other_tasks == sum(report["tasks"] for report in reports)
    assert steps == other_steps == 5


def test_the_last_run_of_a_given_time_is_cut_short_at_max_steps_and_merged() -> None:
    (states, reports, _, _), (others, _, _, _) = in_workers(_uneven, 2, 5)
    assert reports[-1]["iterations"] == 1
    assert reports[-1]["tasks"] == 2 * 4
    assert same(states[-1], others[-1])
    assert not same(states[-1], states[-2])


def test_a_run_has_a_length_or_a_time() -> None:
    with pytest.raises(ConfigError, match=r"run_length is 5 and trainer.strategy.run_seconds is 1"):
        DMAMLStrategy(run_length=5, run_seconds=1.0)
    with pytest.raises(ConfigError, match=r"trainer.strategy.run_seconds is 0"):
        DMAMLStrategy(run_seconds=0)


# -- workers that are no longer finite ---------------------------------------------------------------------------------


def _train_poisoned(kind: Any, worker: int, settings: dict[str, Any], stop: int = 12) -> Any:
    torch.set_num_threads(1)
    recorder = Recorder()
    strategy = kind(run_length=3, on_non_finite="exclude", **settings)
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=stop, callbacks=[recorder])
    trainer.fit(small_maml(meta_optimizer=adam), TrainingRuns(PoisonedData(worker, 1, 1), 20))
    return recorder.states, recorder.reports


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_that_is_not_finite_is_left_out_and_goes_on_from_the_others_weights(worker: int) -> None:
    (states, reports), (others, _) = in_workers(_train_poisoned, 2, DMAMLStrategy, worker, {"moments": "keep"})
    assert _same_states(states, others)
    reference = ByHand(2, adam)
    for run, state in enumerate(states):
        reference.run(run, 3)
        if run == 1:
            reference.merge([0.0, 1.0] if worker == 0 else [1.0, 0.0])
            reference.optimizers[worker].state.clear()
        else:
            reference.merge()
        assert close(weights_of(state), reference.weights[0]), run
    assert [report["merge"]["merge/excluded"] for report in reports] == [0, 1, 0, 0]
    assert all(torch.isfinite(report["loss"]) for report in reports)
    assert reports[1]["tasks"] == 4 * (3 + 2)


def test_parallel_tasks_leave_out_a_meta_gradient_that_is_not_finite() -> None:
    (states, reports), (others, _) = in_workers(_train_poisoned, 2, TaskParallelStrategy, 1, {})
    assert _same_states(states, others)
    assert len(states) == 4
    assert all(torch.isfinite(weights_of(state)).all() for state in states)
    assert torch.isfinite(reports[1]["loss"])


def _poison_everyone(kind: Any) -> str:
    class Poisoned(PoisonedData):
        def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> Any:
            return super().sample(worker=0, run=run, iteration=iteration)

    strategy = kind(run_length=3, on_non_finite="exclude")
    with pytest.raises(NonFiniteError) as caught:
        small_trainer(devices=2, strategy=strategy).fit(small_maml(), TrainingRuns(Poisoned(0, 1, 1), 20))
    return str(caught.value)


@pytest.mark.parametrize("kind", [DMAMLStrategy, TaskParallelStrategy])
def test_where_no_worker_is_finite_all_stop(kind: Any) -> None:
    for message in in_workers(_poison_everyone, 2, kind):
        assert "worker 0 is not finite in run 1, meta-iteration 1" in message


@pytest.mark.parametrize(
    ("setting", "choices"),
    [
        ("moments", "keep or average or reset"),
        ("transfer_dtype", "float32 or bfloat16"),
        ("on_non_finite", "stop or exclude"),
    ],
)
def test_a_setting_that_is_no_choice_is_named_with_its_choices(setting: str, choices: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer.strategy.{setting} is other, but must be {choices}"):
        DMAMLStrategy(**{setting: "other"})  # type: ignore[arg-type]

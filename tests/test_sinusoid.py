"""Sinusoid regression: the distribution of the MAML paper, sampled as a pure function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data_modules import Sinusoid, sinusoid
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import TaskBatch, TaskSource, check_tasks, stack_tasks


def fit(task: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitude (T,), phase (T,) and largest residual (T,) of the sine through each task's points, in float64."""
    x = torch.cat([task.support_x, task.query_x], dim=1).double()
    y = torch.cat([task.support_y, task.query_y], dim=1).double()
    # A sin(x - p) = A cos p * sin x - A sin p * cos x is linear in its two factors.
    basis = torch.cat([x.sin(), -x.cos()], dim=-1)
    factors = torch.linalg.lstsq(basis, y).solution
    residual = (basis @ factors - y).abs().amax(dim=(1, 2))
    return factors.norm(dim=(1, 2)), torch.atan2(factors[:, 1, 0], factors[:, 0, 0]), residual


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.fixture(scope="module")
def many() -> TaskBatch:
    return Sinusoid(meta_batch=4000, seed=1).sample(worker=0, run=0, iteration=0)


def test_every_task_is_one_sine_shared_by_support_and_query(many: TaskBatch) -> None:
    residual = fit(many)[2]

    assert residual.max() < 1e-5


def test_amplitudes_are_uniform_from_a_tenth_to_five(many: TaskBatch) -> None:
    amplitude = fit(many)[0]

    assert amplitude.min() > 0.1 - 1e-4
    assert amplitude.max() < 5.0 + 1e-4
    assert torch.histc(amplitude, 10, 0.1, 5.0).min() > 330  # of 400 expected; six standard deviations are 114


def test_phases_are_uniform_from_zero_to_pi(many: TaskBatch) -> None:
    phase = fit(many)[1]

    assert phase.min() > -1e-3
    assert phase.max() < math.pi + 1e-3
    assert torch.histc(phase, 10, 0.0, math.pi).min() > 330


def test_inputs_are_uniform_from_minus_five_to_five(many: TaskBatch) -> None:
    for x in (many.support_x, many.query_x):
        assert x.abs().max() <= 5.0
        assert torch.histc(x, 10, -5.0, 5.0).min() > 3700  # of 4,000 expected


def test_a_meta_batch_has_the_shapes_its_settings_say() -> None:
    data = Sinusoid(shots=3, queries=7, meta_batch=2)

    batch = data.sample(worker=0, run=0, iteration=0)

    check_tasks(batch)
    assert isinstance(data, TaskSource)
    assert batch.support_x.shape == batch.support_y.shape == (2, 3, 1)
    assert batch.query_x.shape == batch.query_y.shape == (2, 7, 1)
    assert batch.numbers is None


def test_sampling_twice_gives_the_same_tasks_and_moves_no_global_generator() -> None:
    state = torch.get_rng_state()
    data = Sinusoid(seed=3)

    first = data.sample(worker=1, run=2, iteration=3)
    data.sample(worker=0, run=0, iteration=0)

    assert same(first, data.sample(worker=1, run=2, iteration=3))
    assert same(first, Sinusoid(seed=3).sample(worker=1, run=2, iteration=3))
    assert torch.equal(state, torch.get_rng_state())


def test_a_meta_batch_is_the_same_sampled_ahead_or_alone_and_is_handed_out_unchanged_after_a_change() -> None:
    data = Sinusoid(seed=3)
    walked = [data.sample(worker=0, run=1, iteration=iteration) for iteration in range(40)]

    alone = [Sinusoid(seed=3).sample(worker=0, run=1, iteration=iteration) for iteration in range(40)]
    assert all(same(one, other) for one, other in zip(walked, alone, strict=True))

    for part in walked[7].tensors():
        part.zero_()
    assert same(data.sample(worker=0, run=1, iteration=7), alone[7])
    assert same(walked[8], alone[8])


def test_a_setting_that_changes_is_heeded_by_the_next_meta_batch() -> None:
    data = Sinusoid(seed=3)
    data.sample(worker=0, run=1, iteration=0)

    data.shots = 4

    assert data.sample(worker=0, run=1, iteration=1).support_x.shape == (25, 4, 1)


def test_workers_runs_iterations_and_seeds_have_different_tasks() -> None:
    data = Sinusoid(seed=0)
    batches = [data.sample(worker=w, run=r, iteration=i) for w in range(3) for r in range(3) for i in range(3)]
    batches.append(Sinusoid(seed=1).sample(worker=0, run=0, iteration=0))

    inputs = torch.cat([batch.support_x.flatten() for batch in batches])

    assert len(inputs.unique()) > 0.999 * len(inputs)


def test_evaluation_tasks_do_not_depend_on_the_training_seed() -> None:
    for split in ("val", "test"):
        assert same(Sinusoid(seed=0).evaluation_task(split, 5), Sinusoid(seed=9).evaluation_task(split, 5))


def test_evaluation_tasks_depend_on_split_number_and_evaluation_seed() -> None:
    data = Sinusoid()
    task = data.evaluation_task("test", 5)

    assert task.numbers is not None
    assert task.numbers.item() == 5
    assert not same(task, data.evaluation_task("test", 6))
    assert not same(task, data.evaluation_task("val", 5))
    assert not same(task, Sinusoid(evaluation_seed=1).evaluation_task("test", 5))


def test_the_seed_of_seed_everything_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")

    assert Sinusoid().seed == 17
    assert Sinusoid(seed=3).seed == 3


def test_validation_yields_every_task_once_in_chunks() -> None:
    data = Sinusoid(meta_batch=8, val_tasks=260)

    chunks = list(data.val_dataloader())

    assert [chunk.tasks for chunk in chunks] == [100, 100, 60]
    assert torch.cat([chunk.numbers for chunk in chunks if chunk.numbers is not None]).tolist() == list(range(260))


def test_plots_show_the_support_sets_of_the_meta_test_and_the_true_curves() -> None:
    data = Sinusoid(shots=5, seed=4)

    plotted = data.tasks_to_plot(3, points=50)
    figure = plotted.tasks

    check_tasks(figure)
    assert plotted.queries_are_curves
    assert figure.query_x.shape == (3, 50, 1)
    for index in range(3):
        task = data.evaluation_task("test", index)
        assert torch.equal(figure.support_x[index], task.support_x)
        torch.testing.assert_close(figure.support_y[index], task.support_y)
        together = stack_tasks([figure.task(index)._replace(support=task.support)])
        assert fit(together)[2].item() < 1e-5


@pytest.mark.parametrize("setting", ["shots", "queries", "meta_batch", "runs_per_epoch", "val_tasks", "test_tasks"])
def test_a_count_that_is_not_positive_is_named(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{setting} is 0"):
        Sinusoid(**{setting: 0})


@pytest.mark.parametrize(("tasks", "shots", "queries"), [(25, 10, 10), (1, 10, 3), (7, 3, 200)])
def test_tasks_sampled_at_once_are_to_the_bit_the_formula_one_tensor_after_another(
    tasks: int, shots: int, queries: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = [10.0 * torch.rand(tasks, points, 1, generator=generator) - 5.0 for points in (shots, queries)]
    expected = [tensor for each in x for tensor in (each, amplitude * torch.sin(each - phase))]
    found = sinusoid._sample([4, 5, 6], tasks, shots, queries)[1]
    assert all(torch.equal(one, other) for one, other in zip(found.tensors()[:4], expected, strict=True))

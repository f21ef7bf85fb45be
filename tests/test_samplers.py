"""Both samplers sample from the distribution that learn2learn's task transforms define: all ordered choices alike.

Few classes and samples, so that whole tasks can be counted. The chi-square tests have fixed seeds, and would by chance
fail with one in a hundred thousand seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_modules import samplers
from data_modules.samplers import BatchedSampler, Learn2LearnSampler, Sampler
from dmaml_pl.tasks import derive_seeds

Numbers = NDArray[np.int64]

CLASSES, SAMPLES, WAYS, PER_CLASS = 7, 6, 3, 4
SMALLEST_P = 1e-5


def sampled(make: Callable[..., Sampler], seeds: list[int]) -> tuple[Numbers, Numbers]:
    """Classes (T, N), and of each the samples (T, N, K + Q)."""
    numbers = make([SAMPLES] * CLASSES, ways=WAYS, per_class=PER_CLASS)(seeds)
    classes = numbers // SAMPLES
    assert (classes == classes[:, :, :1]).all()
    return classes[:, :, 0], numbers % SAMPLES


@pytest.fixture(scope="module", params=["sorted", "ranked", "of neighbouring seeds", "learn2learn"])
def tasks(request: pytest.FixtureRequest) -> tuple[Numbers, Numbers]:
    """Many tasks, sampled in every way there is."""
    if request.param == "learn2learn":
        return sampled(Learn2LearnSampler, derive_seeds("tasks", count=6000))
    seeds = list(range(30_000)) if request.param == "of neighbouring seeds" else derive_seeds("tasks", count=30_000)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ranked":
            patch.setattr(samplers._Choice, "SORTED_UP_TO", 0)
        return sampled(BatchedSampler, seeds)


def counted(*columns: Numbers, among: int) -> Numbers:
    """How often each combination of values in 0 .. `among` - 1 was seen."""
    shape = (among,) * len(columns)
    return np.bincount(np.ravel_multi_index(columns, shape).ravel(), minlength=among ** len(columns))


def p_value(chi_square: float, freedom: int) -> float:
    """The chance of a chi-square as large as this."""
    halves = torch.tensor([freedom / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def assert_even(counts: Numbers) -> None:
    expected = counts.sum() / len(counts)
    assert expected > 10, "too few were seen to tell"
    assert p_value(float(((counts - expected) ** 2).sum() / expected), len(counts) - 1) > SMALLEST_P, counts


def assert_all_orders_are_even(chosen: Numbers, among: int) -> None:
    """Nothing is chosen twice, and all ordered choices (..., count) are equally likely."""
    seen = counted(*np.moveaxis(chosen, -1, 0), among=among)
    count = chosen.shape[-1]
    possible = counted(*np.array(list(permutations(range(among), count))).T, among=among).astype(bool)
    assert not seen[~possible].any()
    assert_even(seen[possible])


def assert_alike(one: Numbers, other: Numbers) -> None:
    """Of one distribution, whatever that is."""
    table = np.stack([one, other])[:, one + other > 0].astype(float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert p_value(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1) > SMALLEST_P, table


def test_the_chi_square_is_that_of_the_textbooks() -> None:
    assert p_value(3.841, 1) == pytest.approx(0.05, abs=1e-4)
    assert p_value(124.342, 100) == pytest.approx(0.05, abs=1e-4)
    with pytest.raises(AssertionError):
        assert_even(np.array([100, 100, 190]))
    with pytest.raises(AssertionError):
        assert_alike(np.array([100, 200, 100]), np.array([200, 200, 50]))


def test_every_choice_of_classes_and_of_their_labels_is_equally_likely(tasks: tuple[Numbers, Numbers]) -> None:
    classes, _ = tasks
    assert_all_orders_are_even(classes, among=CLASSES)


def test_every_ordered_choice_of_samples_is_equally_likely(tasks: tuple[Numbers, Numbers]) -> None:
    _, samples = tasks
    assert_all_orders_are_even(samples, among=SAMPLES)


def test_classes_of_a_task_and_neighbouring_tasks_are_independent(tasks: tuple[Numbers, Numbers]) -> None:
    classes, samples = tasks
    for one, other in combinations(range(WAYS), 2):
        assert_even(counted(samples[:, one, 0], samples[:, other, 0], among=SAMPLES))
        assert_even(counted(samples[:, one, 0], samples[:, other, PER_CLASS - 1], among=SAMPLES))
    for label in range(WAYS):
        assert_even(np.bincount(classes[:, label] * SAMPLES + samples[:, label, 0]))
        assert_even(counted(classes[:-1, 0], classes[1:, label], among=CLASSES))
        assert_even(counted(samples[:-1, 0, 0], samples[1:, label, 0], among=SAMPLES))


def test_the_batched_sampler_samples_from_the_distribution_of_learn2learns_transforms() -> None:
    classes, samples = sampled(BatchedSampler, derive_seeds("batched", count=20_000))
    their_classes, their_samples = sampled(Learn2LearnSampler, derive_seeds("theirs", count=6000))

    for label in range(WAYS):
        assert_alike(np.bincount(classes[:, label]), np.bincount(their_classes[:, label]))
        for place in range(PER_CLASS):
            assert_alike(np.bincount(samples[:, label, place]), np.bincount(their_samples[:, label, place]))
    assert_alike(counted(*classes.T, among=CLASSES), counted(*their_classes.T, among=CLASSES))
    together, theirs = (np.sort(every, axis=1) for every in (classes, their_classes))
    assert_alike(counted(*together.T, among=CLASSES), counted(*theirs.T, among=CLASSES))
    assert_alike(
        counted(*np.moveaxis(samples, -1, 0), among=SAMPLES), counted(*np.moveaxis(their_samples, -1, 0), among=SAMPLES)
    )


def test_all_of_thousands_of_classes_are_chosen_evenly() -> None:
    numbers = BatchedSampler([20] * 4400, ways=5, per_class=16)(derive_seeds("many", count=20_000))

    assert_even(np.bincount(numbers[:, :, 0].ravel() // 20, minlength=4400))
    assert_even(np.bincount(numbers.ravel() % 20, minlength=20))
    assert all(len(set(task)) == 5 * 16 for task in numbers[:2000].reshape(2000, -1).tolist())
    assert all(len(set(task)) == 5 for task in (numbers[:, :, 0] // 20).tolist())


@pytest.mark.parametrize("make", [BatchedSampler, Learn2LearnSampler])
@pytest.mark.parametrize(("classes", "samples"), [(2, 1), (9, 9), (64, 65), (65, 64)])
def test_a_task_of_all_that_there_is_holds_everything_once(
    make: Callable[..., Sampler], classes: int, samples: int
) -> None:
    numbers = make([samples] * classes, ways=classes, per_class=samples)([3, 4])

    assert all(np.array_equal(np.sort(task, axis=None), np.arange(classes * samples)) for task in numbers)


@pytest.mark.parametrize("make", [BatchedSampler, Learn2LearnSampler])
def test_samplers_leave_global_generators_as_they_found_them(make: Callable[..., Sampler]) -> None:
    sampler = make([SAMPLES] * CLASSES, ways=WAYS, per_class=PER_CLASS)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002 - what is tested

    sampler([1, 2])

    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002 - what is tested
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    sampler = BatchedSampler([SAMPLES] * CLASSES, ways=WAYS, per_class=PER_CLASS)

    first = sampler.random_bits([1234567, 0])[:, :3].tolist()

    assert first[0] == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of its reference in C
    assert first[1] == [16294208416658607535, 7960286522194355700, 487617019471545679]


def test_a_seed_gives_the_same_task_in_every_version_and_on_every_machine() -> None:
    few = BatchedSampler([6] * 7, ways=2, per_class=3)([0, 2**64 - 1])
    many = BatchedSampler([600] * 4400, ways=2, per_class=3)([0, 2**64 - 1])

    assert few.tolist() == [[[13, 15, 17], [29, 27, 26]], [[17, 14, 15], [23, 22, 19]]]
    assert many.tolist() == [
        [[2331615, 2332182, 2331664], [1138996, 1138904, 1139263]],
        [[2359931, 2360056, 2360223], [2409494, 2409565, 2409150]],
    ]


# ---- whatever the sizes


@st.composite
def problems(draw: st.DrawFn, *, alike: bool = False) -> dict[str, Any]:
    """A sampler's arguments: classes of any sizes, in any order and with gaps, of which a task can be made."""
    counts = st.integers(2 if alike else 1, 100)  # one alone could not be uneven
    sizes = draw(st.lists(st.just(draw(counts)) if alike else counts, min_size=2, max_size=90))
    gaps = np.array(draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes))))
    order = np.array(draw(st.permutations(range(len(sizes)))))
    placed = np.array(sizes)[order]
    starts = np.empty(len(sizes), dtype=np.int64)
    starts[order] = placed.cumsum() - placed + gaps.cumsum()
    ways, per_class = draw(st.integers(1, len(sizes))), draw(st.integers(1, min(sizes)))
    return {"samples": np.array(sizes), "starts": starts, "ways": ways, "per_class": per_class}


SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12)
KINDS = st.sampled_from([BatchedSampler, Learn2LearnSampler])
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def class_of(numbers: Numbers, problem: dict[str, Any]) -> Numbers:
    """The class that each sample number belongs to, -1 where it belongs to none."""
    starts, ends = problem["starts"], problem["starts"] + problem["samples"]
    within = (numbers[..., None] >= starts) & (numbers[..., None] < ends)
    return np.where(within.any(-1), within.argmax(-1), -1)


@PROPERTY
@given(KINDS, problems(), SEEDS)
def test_a_task_has_other_classes_and_samples_for_each_place_and_each_sample_is_of_its_class(
    kind: type[Sampler], problem: dict[str, Any], seeds: list[int]
) -> None:
    tasks = kind(**problem)(seeds)

    assert tasks.shape == (len(seeds), problem["ways"], problem["per_class"])
    classes = class_of(tasks, problem)
    assert (classes == classes[:, :, :1]).all()
    assert (classes >= 0).all()
    for task, of in zip(tasks, classes[:, :, 0], strict=True):
        assert len(set(task.ravel().tolist())) == task.size
        assert len(set(of.tolist())) == len(of)


@PROPERTY
@given(KINDS, problems(), SEEDS, st.integers(1, 12))
def test_chunks_join_to_the_whole_and_a_task_follows_from_its_seed_alone(
    kind: type[Sampler], problem: dict[str, Any], seeds: list[int], size: int
) -> None:
    sampler = kind(**problem)
    whole = sampler(seeds)

    chunks = [sampler(seeds[first : first + size]) for first in range(0, len(seeds), size)]

    assert np.array_equal(np.concatenate(chunks), whole)
    assert np.array_equal(kind(**problem)(seeds[::-1]), whole[::-1])


@settings(PROPERTY, max_examples=15)
@given(problems(alike=True), st.integers(0, 2**32))
def test_every_class_and_every_sample_of_a_class_is_as_likely_as_any_other(problem: dict[str, Any], seed: int) -> None:
    classes, samples = len(problem["samples"]), int(problem["samples"][0])
    count = 1 + 40 * max(classes, samples)
    tasks = BatchedSampler(**problem)(derive_seeds("even", seed, count=count))
    chosen = class_of(tasks[:, :1, :1], problem).ravel()

    assert_even(np.bincount(chosen, minlength=classes))
    assert_even(np.bincount(tasks[:, 0, -1] - problem["starts"][chosen], minlength=samples))


@settings(PROPERTY, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_a_class_is_as_likely_as_any_other_however_few_samples_it_has(few: int, more: int, seed: int) -> None:
    sizes = [few] * 3 + [few + more] * 4
    classes = class_of(
        BatchedSampler(sizes, ways=2, per_class=few)(derive_seeds("sizes", seed, count=1000)),
        {"samples": np.array(sizes), "starts": np.array(sizes).cumsum() - sizes},
    )

    assert_even(np.bincount(classes[:, 0, 0], minlength=7))

"""What all image data sets promise of their tasks, whoever samples them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from data_modules import Glyphs, ImageFolder, MiniImageNet, Omniglot, Sinusoid, Tabular, TaskDataModule
from data_modules.images import ImageTasks
from data_modules.samplers import SamplerName
from dmaml_pl.data import EvaluationTasks, Split
from dmaml_pl.tasks import TaskBatch, check_tasks, derive_seed, derive_seeds, stack_tasks

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


class Numbered(ImageTasks):
    """Images whose first pixel says the class and whose second the sample: 30 classes of 20 samples a split."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"shots": 2, "queries": 3, "val_tasks": 4, "test_tasks": 4, "seed": 0, **settings})
        self.loaded = 0

    def load_splits(self) -> dict[Split, Tensor]:
        self.loaded += 1
        images = torch.zeros(30, 20, 28, 28, dtype=torch.uint8)
        images[..., 0, 0] = torch.arange(30, dtype=torch.uint8)[:, None]
        images[..., 0, 1] = torch.arange(20, dtype=torch.uint8)
        return {"train": images, "val": images.clone(), "test": images.clone()}


class Lines(TaskDataModule):
    """Tasks y = a x, one of which is sampled at a time, as a user's own data module may do."""

    def __init__(self, *, shots: int = 2, queries: int = 3, meta_batch: int = 3, **settings: Any) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        generator = torch.Generator().manual_seed(seed)
        slope, x, further_x = (torch.rand(count, 1, generator=generator) for count in (1, self.shots, self.queries))
        return TaskBatch.of(x, slope * x, further_x, slope * further_x)


def made(**settings: Any) -> Numbered:
    data = Numbered(**settings)
    data.setup("fit")
    return data


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def tags(x: Tensor) -> list[tuple[int, int]]:
    """(class, sample) of each image of `Numbered`."""
    return [(int(a), int(b)) for a, b in (x[:, 0, 0, :2] * 255).round().tolist()]


# ---- what a task is


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_support_and_query_share_classes_and_labels_but_no_sample(sampler: SamplerName) -> None:
    data = made(sampler=sampler)
    for seed in range(50):
        task = data.sample_task("train", seed)
        support, query = tags(task.support_x), tags(task.query_x)
        label_of = {number: label for (number, _), label in zip(support, task.support_y.tolist(), strict=True)}

        assert len(label_of) == len(set(label_of.values())) == 5
        assert len(set(support + query)) == 5 * (2 + 3)
        assert [label_of[number] for number, _ in query] == task.query_y.tolist()
        assert task.support_y.tolist() == sorted(task.support_y.tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shots", [1, 5, 19])
def test_all_samples_of_a_class_can_be_used(shots: int, sampler: SamplerName) -> None:
    task = made(ways=30, shots=shots, queries=20 - shots, sampler=sampler).sample_task("test", 0)

    assert len(set(tags(task.support_x) + tags(task.query_x))) == 30 * 20


def test_both_samplers_give_batches_of_equal_form_and_pixels() -> None:
    batched, reference = (made(sampler=sampler).sample(worker=0, run=0, iteration=0) for sampler in SAMPLERS)

    for batch in (batched, reference):
        check_tasks(batch)
        assert all(tensor.is_contiguous() for tensor in batch.tensors())
    for a, b in zip(batched.tensors(), reference.tensors(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_pixels_go_from_exactly_zero_to_exactly_one() -> None:
    data = made(ways=30, shots=1, queries=19)
    data._images["train"][..., 0, 2] = 255

    task = data.sample_task("train", 0)

    assert task.query_x[:, 0, 0, 2].unique().tolist() == [1.0]
    assert task.query_x[:, 0, 0, 3].unique().tolist() == [0.0]


# ---- what a task follows from


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_task_depends_on_its_arguments_alone_and_moves_no_global_generator(sampler: SamplerName) -> None:
    data = made(sampler=sampler)
    tasks = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what is tested
        torch.manual_seed(seed)
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
        tasks.append(data.sample_task("train", 5))
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])

    assert same(tasks[0], tasks[1])
    assert same(tasks[0], made(sampler=sampler).sample_task("train", 5))
    assert not same(tasks[0], data.sample_task("train", 6))


def test_a_failed_sampling_puts_the_global_generator_back() -> None:
    data: Any = made(sampler="learn2learn")
    data._samplers["train"]._tasks = ()
    before = random.getstate()

    with pytest.raises(IndexError):
        data.sample_task("train", 5)

    assert random.getstate() == before


@pytest.mark.parametrize("data", [made(), made(sampler="learn2learn"), Lines()], ids=[*SAMPLERS, "sample_task alone"])
def test_a_task_is_the_same_whatever_is_sampled_beside_it(data: TaskDataModule) -> None:
    seeds = [7, 0, 2**63 - 1, 7, 12]

    together = data.sample_tasks("val", seeds)

    assert same(together, stack_tasks([data.sample_task("val", seed) for seed in seeds]))
    assert same(data.sample_tasks("val", seeds[::-1]), together.map(lambda tensor: tensor.flip(0)))


@pytest.mark.parametrize("data", [made(), made(sampler="learn2learn"), Lines()], ids=[*SAMPLERS, "sample_task alone"])
def test_evaluation_tasks_do_not_depend_on_chunks_and_workers(data: TaskDataModule) -> None:
    alone = stack_tasks([data.evaluation_task("val", index) for index in range(11)])
    assert alone.numbers is not None

    for chunk, workers in ((1, 1), (3, 1), (25, 1), (2, 2), (1, 3)):
        shares = [EvaluationTasks(data, "val", 11, chunk, worker, workers) for worker in range(workers)]
        found = [batch.task(number) for share in shares for batch in share for number in range(batch.tasks)]
        found.sort(key=number_of)
        assert same(stack_tasks(found), alone), (chunk, workers)


def number_of(task: TaskBatch) -> int:
    assert task.numbers is not None
    return int(task.numbers)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_larger_meta_batch_begins_with_the_tasks_of_a_smaller_one(sampler: SamplerName) -> None:
    small, large = (made(meta_batch=tasks, sampler=sampler).sample(worker=1, run=2, iteration=3) for tasks in (2, 6))

    assert same(small, large.map(lambda tensor: tensor[:2]))


def test_more_queries_leave_the_support_sets_as_they_are() -> None:
    few, many = (made(queries=queries).sample(worker=0, run=0, iteration=0) for queries in (1, 9))

    assert torch.equal(few.support_x, many.support_x)
    assert torch.equal(few.query_x.unflatten(1, (5, 1)), many.query_x.unflatten(1, (5, 9))[:, :, :1])


def test_workers_runs_iterations_and_seeds_have_different_tasks() -> None:
    data = made()
    batches = [data.sample(worker=w, run=r, iteration=i) for w in range(2) for r in range(2) for i in range(2)]
    batches.append(made(seed=1).sample(worker=0, run=0, iteration=0))

    tasks = {tuple(tags(x)) for batch in batches for x in batch.support_x}

    assert len(tasks) == 9 * 4


def test_seeds_derived_together_are_those_derived_alone() -> None:
    parts: Sequence[int | str] = ("train", -3, 0, "", 12)

    assert derive_seeds(*parts, count=12) == [derive_seed(*parts, number) for number in range(12)]
    assert derive_seeds(*parts, count=0) == []


# ---- settings


class Steep(Lines):
    """A user's own data module: one setting more, and the base's passed on."""

    def __init__(self, slope: float = 2.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.slope = slope


class Steeper(Steep):
    def __init__(self, *, slope: float = 3.0, **settings: Any) -> None:
        super().__init__(slope, **settings)


@pytest.mark.parametrize("kind", [Glyphs, Omniglot, ImageFolder, MiniImageNet, Tabular, Sinusoid, Steep, Steeper])
def test_a_data_module_shows_what_it_passes_on_and_the_command_line_has_it(kind: type[TaskDataModule]) -> None:
    shown = inspect.signature(kind).parameters
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")

    assert {f"data.{name}" for name in shown} == {
        name for name in parser.get_defaults().as_flat().__dict__ if name != "data"
    }
    assert {"shots", "queries", "meta_batch", "runs_per_epoch", "seed", "evaluation_seed"} <= set(shown)
    defaults = parser.get_defaults()["data"]
    given = {name: each.default for name, each in shown.items() if each.default is not each.empty}
    assert {name: defaults[name] for name in given} == given


def test_a_setting_that_no_base_has_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="'shot'"):
        Glyphs(shot=1)


# ---- where the images are


def test_setting_up_twice_loads_once() -> None:
    data = made()
    data.setup("test")

    assert data.loaded == 1


def test_the_images_of_a_split_move_to_the_trainers_device_once_and_as_uint8() -> None:
    data: Any = made()
    on_cpu = data._images["val"]
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))

    batch = data.sample(worker=0, run=0, iteration=0)
    moved = data._images["train"]
    data.sample(worker=0, run=0, iteration=1)

    assert all(tensor.device.type == "meta" for tensor in batch.tensors())
    assert batch.query_x.shape == (4, 15, 1, 28, 28)
    assert data._images["train"] is moved
    assert moved.dtype == torch.uint8
    assert data._images["val"] is on_cpu


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_does_not_copy_the_images(sampler: SamplerName) -> None:
    data = made(sampler=sampler)
    images = {split: tensor.data_ptr() for split, tensor in data._images.items()}
    data.sample(worker=0, run=0, iteration=0)

    assert {split: tensor.data_ptr() for split, tensor in data._images.items()} == images

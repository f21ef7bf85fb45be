"""What the image data sets share: N-way K-shot tasks, drawn by learn2learn's task transforms from images in memory.

Legend: N ways, K shots, Q queries a class, H W image axes; a split's images are one uint8 (classes, samples, H, W).
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_modules.base import Split, TaskDataModule
from dmaml_pl import _learn2learn
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import TaskBatch, stack_tasks


class ImageTasks(TaskDataModule):
    """Base of the image data sets: a subclass says which images each split holds.

    A task takes N classes of its split, gives them the labels 0 .. N - 1 by chance, and takes K + Q samples of each,
    none of them twice. Its samples are sorted by label: support_x is (N * K, 1, H, W), query_x (N * Q, 1, H, W),
    float32 from 0 to 1; support_y is (N * K,), query_y (N * Q,), int64.

    Args:
        ways: N, classes of a task.
        shots: K, support samples per class.
        queries: Q, query samples per class.
        meta_batch: T, tasks in the meta-batch of one worker.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of the validation and test tasks.
    """

    def __init__(
        self,
        *,
        ways: int,
        shots: int,
        queries: int,
        meta_batch: int,
        runs_per_epoch: int,
        val_tasks: int,
        test_tasks: int,
        seed: int | None,
        evaluation_seed: int,
    ) -> None:
        super().__init__(
            shots=shots,
            queries=queries,
            meta_batch=meta_batch,
            runs_per_epoch=runs_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            seed=seed,
            evaluation_seed=evaluation_seed,
        )
        self.ways = ways
        self._tasksets: dict[Split, Any] = {}

    @abstractmethod
    def load_splits(self) -> dict[Split, Tensor]:
        """The images of each split, uint8 (classes, samples, H, W), all classes with equally many samples."""

    def setup(self, stage: str | None = None) -> None:
        """Load the images and make ready to draw tasks; a second call does nothing.

        Raises:
            ConfigError: a split has too few classes, or a class too few samples, for the tasks asked of them.
        """
        if self._tasksets:
            return
        if self.ways < 2:
            raise ConfigError(f"data.ways is {self.ways}, but a task needs at least 2 classes to tell apart.")
        splits = self.load_splits()
        smallest = min(splits, key=lambda split: len(splits[split]))  # so that what it allows, every split allows
        self._check(smallest, *splits[smallest].shape[:2])
        samples = self.shots + self.queries
        self._tasksets = {split: _taskset(images, self.ways, samples) for split, images in splits.items()}

    def _check(self, split: Split, classes: int, samples: int) -> None:
        name = type(self).__name__
        if self.ways > classes:
            raise ConfigError(
                f"data.ways is {self.ways}, but the {split} split of {name} has {classes} classes: "
                f"choose 2 to {classes}."
            )
        if self.shots + self.queries > samples:
            raise ConfigError(
                f"data.shots + data.queries is {self.shots} + {self.queries}, but a class of {name} has "
                f"{samples} samples: choose them to be at most {samples} together."
            )

    def draw_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis, as a pure function of its arguments."""
        state = random.getstate()  # the one generator that learn2learn's transforms draw from
        random.seed(seed)
        try:
            images, labels = self._tasksets[split][0]
        finally:
            random.setstate(state)
        # ConsecutiveLabels has put each class's samples together, so the classes are an axis of their own.
        images = images.view(self.ways, -1, 1, *images.shape[1:])
        labels = labels.view(self.ways, -1)
        order = labels[:, 0].argsort()
        images, labels = images[order].float().div_(255), labels[order]
        (support_x, query_x), (support_y, query_y) = (
            (part[:, : self.shots].flatten(0, 1), part[:, self.shots :].flatten(0, 1)) for part in (images, labels)
        )
        return TaskBatch(support_x, support_y, query_x, query_y)

    def figure_tasks(self, tasks: int) -> TaskBatch:
        """Meta-test tasks 0 .. `tasks` - 1, (T, ...)."""
        return stack_tasks([self.evaluation_task("test", index) for index in range(tasks)])


class _Samples(Dataset[tuple[int, int]]):
    """Sample number -> (sample number, class number): all that the transforms need; the images stay in one tensor."""

    def __init__(self, classes: int, samples: int) -> None:
        self.classes = classes
        self.samples = samples

    def __len__(self) -> int:
        return self.classes * self.samples

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index // self.samples


def _taskset(images: Tensor, ways: int, samples: int) -> Any:
    """An endless learn2learn Taskset over uint8 (classes, samples, H, W): items are uint8 (S, H, W) and int64 (S,)."""
    data = _learn2learn.load().data
    classes, per_class = images.shape[:2]
    # The bookkeeping is given because MetaDataset would else load every sample; labels are integers because RemapLabels
    # goes through a set of them, whose order would change from process to process with strings.
    numbers = {label: list(range(label * per_class, (label + 1) * per_class)) for label in range(classes)}
    dataset = data.MetaDataset(_Samples(classes, per_class), labels_to_indices=numbers)
    transforms = [
        data.transforms.NWays(dataset, n=ways),
        data.transforms.KShots(dataset, k=samples),
        data.transforms.LoadData(dataset),
        data.transforms.RemapLabels(dataset),
        data.transforms.ConsecutiveLabels(dataset),
    ]
    pixels = images.flatten(0, 1)

    def gather(items: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        indices, labels = torch.tensor(items).unbind(1)
        return pixels[indices], labels

    return data.Taskset(dataset, task_transforms=transforms, num_tasks=-1, task_collate=gather)

"""What the image data sets share: N-way K-shot tasks, gathered from images that stay in memory as one tensor a split.

Legend: T tasks, N ways, K shots, Q queries a class, H W image axes; a split's images are one uint8 (classes, samples,
H, W).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_modules.base import Split, TaskDataModule
from data_modules.samplers import Sampler, SamplerName, sampler_named
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import TaskBatch


class ImageTasks(TaskDataModule):
    """Base of the image data sets: a subclass says which images each split holds.

    A task takes N classes of its split, gives them the labels 0 .. N - 1 by chance, and takes K + Q samples of each,
    none of them twice. Its samples are sorted by label: support_x is (N * K, 1, H, W), query_x (N * Q, 1, H, W),
    float32 from 0 to 1; support_y is (N * K,), query_y (N * Q,), int64.

    The images of a split move to the trainer's device when the first of its tasks is drawn there; the tasks of a
    meta-batch are then one gather and one conversion on that device.

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
        sampler: "batched" draws all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they draw other tasks of the same distribution.
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
        sampler: SamplerName = "batched",
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
        self.sampler: SamplerName = sampler
        self._samplers: dict[Split, Sampler] = {}
        self._images: dict[Split, Tensor] = {}

    @abstractmethod
    def load_splits(self) -> dict[Split, Tensor]:
        """The images of each split, uint8 (classes, samples, H, W), all classes with equally many samples."""

    def setup(self, stage: str | None = None) -> None:
        """Load the images and make ready to draw tasks; a second call does nothing.

        Raises:
            ConfigError: a split has too few classes, or a class too few samples, for the tasks asked of them.
        """
        if self._samplers:
            return
        if self.ways < 2:
            raise ConfigError(f"data.ways is {self.ways}, but a task needs at least 2 classes to tell apart.")
        sampler = sampler_named(self.sampler)
        splits = self.load_splits()
        smallest = min(splits, key=lambda split: len(splits[split]))  # so that what it allows, every split allows
        self._check(smallest, *splits[smallest].shape[:2])
        for split, images in splits.items():
            classes, samples = images.shape[:2]
            self._images[split] = images.flatten(0, 1)
            self._samplers[split] = sampler(
                classes=classes, samples=samples, ways=self.ways, draws=self.shots + self.queries
            )

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

    def draw_tasks(self, split: Split, seeds: Sequence[int]) -> TaskBatch:
        """Tasks of a split, each a pure function of its own seed, (T, ...), on the trainer's device."""
        numbers = self._samplers[split](seeds)
        images = self._on_device(split)
        # All support sets before all query sets, so that both are views of what is gathered and converted at once.
        support, query = numbers[:, :, : self.shots].reshape(-1), numbers[:, :, self.shots :].reshape(-1)
        index = torch.from_numpy(np.concatenate([support, query])).to(images.device, non_blocking=True)
        pixels = images.index_select(0, index).float().mul_(1 / 255)
        tasks, size = len(seeds), images.shape[1:]
        labels = torch.arange(self.ways, device=images.device).view(1, -1, 1)
        return TaskBatch(
            pixels[: len(support)].view(tasks, -1, 1, *size),
            labels.expand(tasks, -1, self.shots).reshape(tasks, -1),
            pixels[len(support) :].view(tasks, -1, 1, *size),
            labels.expand(tasks, -1, self.queries).reshape(tasks, -1),
        )

    def draw_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis; the same as `draw_tasks` draws among others."""
        return self.draw_tasks(split, [seed]).task(0)

    def figure_tasks(self, tasks: int) -> TaskBatch:
        """Meta-test tasks 0 .. `tasks` - 1, (T, ...), on the CPU."""
        return self.evaluation_tasks("test", range(tasks)).to(torch.device("cpu"))

    def _on_device(self, split: Split) -> Tensor:
        """The images of a split, (classes * samples, H, W), moved to the trainer's device once."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if self._images[split].device != device:
            self._images[split] = self._images[split].to(device)
        return self._images[split]
